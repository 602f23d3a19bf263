const page = JSON.parse(document.getElementById("page-data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const views = {};

// The arms that a figure's legend hides.
const hidden = (name) =>
  [...document.querySelectorAll(`[data-legend="${name}"] input:not(:checked)`)].map((i) => i.value);

const embed = (box, name, panel, config) => {
  const params = [...(panel.params ?? []), { name: "hidden", value: hidden(name) }];
  return vegaEmbed(box, { ...panel, params }, {
    mode: "vega-lite", renderer: "svg", actions: false, ast: true, config,
    tooltip: { theme: dark.matches ? "dark" : "light" },
  });
};

const draw = async () => {
  const config = page.themes[dark.matches ? "dark" : "light"];
  const { legend, ...others } = config;
  for (const box of document.querySelectorAll("[data-chart]")) {
    const name = box.dataset.chart, spec = page.figures[name];
    const panel = { ...(spec.concat ?? [spec])[box.dataset.panel], width: "container" };
    // The page's own legend stands for those of arms.
    const made = await embed(box, name, panel, { ...others, legend: { ...legend, disable: true } });
    (views[name] ??= {})[box.dataset.panel] = made.view;
  }
  document.body.dataset.drawn = dark.matches ? "dark" : "light";
};

const save = (name, url) => Object.assign(document.createElement("a"), { href: url, download: name }).click();

const actions = {
  async figure({ figure, kind }) {
    const config = { ...page.themes.light, background: "white" };
    const { view } = await embed(document.createElement("div"), figure, page.figures[figure], config);
    save(`${figure}.${kind}`, await view.toImageURL(kind, 2));
  },
  file({ file }) {
    save(file, URL.createObjectURL(new Blob([page.files[file]], { type: "text/csv" })));
  },
  sort(_, button) {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    const sign = head.ariaSort === "ascending" ? -1 : 1;
    for (const other of head.parentElement.cells) other.ariaSort = null;
    head.ariaSort = sign > 0 ? "ascending" : "descending";
    const value = (row) => row.cells[head.cellIndex].dataset.value;
    const order = (a, b) =>
      "words" in head.dataset ? a.localeCompare(b, undefined, { numeric: true }) : a - b;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      return sign * order(x, y);
    };
    body.append(...[...body.rows].sort(compare));
  },
};

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-action]");
  if (button) actions[button.dataset.action](button.dataset, button);
});
document.addEventListener("change", (event) => {
  const name = event.target.closest("[data-legend]")?.dataset.legend;
  for (const view of Object.values(views[name] ?? {})) view.signal("hidden", hidden(name)).runAsync();
});
dark.addEventListener("change", draw);
draw();
