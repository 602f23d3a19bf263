"use strict";
const body = document.querySelector("#samples tbody");
const heads = [...document.querySelectorAll("#samples th")];
const find = document.getElementById("find");
const flagged = document.getElementById("flagged");

function compare(place, sign) {
  const key = (row) => row.cells[place].dataset.order ?? row.cells[place].textContent;
  const number = [...body.rows].every((row) => !Number.isNaN(Number(key(row))));
  return (a, b) => sign * (number ? Number(key(a)) - Number(key(b)) : key(a).localeCompare(key(b)));
}

for (const [place, head] of heads.entries()) {
  head.querySelector("button")?.addEventListener("click", () => {
    const descending = head.getAttribute("aria-sort") !== "descending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    body.append(...[...body.rows].sort(compare(place, descending ? -1 : 1)));
  });
}

function filter() {
  const wanted = find.value.trim().toLowerCase();
  let shown = 0;
  for (const row of body.rows) {
    const fits = row.textContent.toLowerCase().includes(wanted);
    row.hidden = !fits || (flagged.checked && !("flagged" in row.dataset));
    shown += row.hidden ? 0 : 1;
  }
  document.getElementById("count").textContent = `${shown} of ${body.rows.length} shown`;
}

find.addEventListener("input", filter);
flagged.addEventListener("change", filter);
filter();
