"""What the recipe `theorem1` shows: tables, sentences, figure and files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradmask.recipes.plots import STYLE, to_png, to_svg
from gradmask.recipes.theorem.numbers import KINDS, SMALL_ERROR
from gradmask.study.files import write_atomically
from gradmask.study.folder import check_ours
from gradmask.study.statistics import Results, left_out, summarise

Row = dict[str, Any]
Key = tuple[str, str, str]  # model, state, activation

TOLERANCE = 0.1
EXPECTED = {"kl": 2, "error": 3}
NETWORKS = {"own": "as built", "smooth": "SiLU"}
_PER_STEP = ("kl", "quadratic", "error", "error_median", "rounding")
# Okabe and Ito's palette, and a dash of its own for each line.
_LINES: tuple[tuple[str, str, str, str, Any], ...] = (
    ("own", "kl", "KL", "#0072b2", "-"),
    ("own", "quadratic", "quadratic form", "#e69f00", (0, (5, 3))),
    ("own", "error", "|KL - quadratic|, as built", "#d55e00", "-"),
    ("smooth", "error", "|KL - quadratic|, SiLU for ReLU", "#009e73", "-."),
)


def write_theorem(folder: Path, results: Results) -> None:
    """Write `theorem1.csv`, `theorem1.md`, `theorem1.svg` and `theorem1.png`.

    There is no figure if all runs diverged.

    Args:
        folder: The output folder.
        results: Contents of `theorem1.json`.
    """
    check_ours(folder)
    write_atomically(folder / "theorem1.csv", to_csv(results))
    write_atomically(folder / "theorem1.md", to_markdown(results))
    if not any(grouped(results)):
        return
    with mpl.rc_context(STYLE):
        figure = draw(results)
    write_atomically(folder / "theorem1.svg", to_svg("theorem1", figure))
    write_atomically(folder / "theorem1.png", to_png(figure))


def print_theorem(results: Results, console: Console) -> None:
    """Print the tables and the findings.

    Args:
        results: Contents of `theorem1.json`.
        console: Where to print.
    """
    for title, header, rows in tables(results):
        table = Table(title=title)
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i > 1 else "left")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
    for sentence in findings(results):
        console.print(sentence, highlight=False, markup=False)


def to_markdown(results: Results) -> str:
    """Tables and findings as Markdown."""
    parts = []
    for title, header, rows in tables(results):
        lines = [header, ["---"] * len(header), *rows]
        cells = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
        parts.append(f"{title}\n\n" + "\n".join(f"| {line} |" for line in cells))
    findings_list = "\n".join(f"- {sentence}" for sentence in findings(results))
    return "\n\n".join([*parts, findings_list]) + "\n"


def to_csv(results: Results) -> str:
    """One line for each model, seed, state, network and step."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "seed", "state", "network", "step", *_PER_STEP, "fitted"])
    for run in results["runs"]:
        for found in _measurements(run):
            for i, step in enumerate(found["steps"]):
                values = [f"{found[name][i]:.6e}" for name in _PER_STEP]
                place = [run["model"], run["seed"], found["state"], found["activation"]]
                writer.writerow([*place, f"{step:.6e}", *values, int(step in found["fitted"])])
    return text.getvalue()


def tables(results: Results) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of each table: slopes and errors, then the diagonal form."""
    rate, share = (f"{step:.2g}" for step in _rates(results))
    header = ["model", "network", "KL slope", "error slope", "fitted ε"]
    header += [f"% off at {rate}", f"% off at {share}"]
    rows = []
    for key, runs in grouped(results):
        cells = [_spread([run["slopes"][name] for run in runs]) for name in EXPECTED]
        ends = [step for run in runs for step in run["fitted"]]
        cells.append(f"{min(ends):.0e} to {max(ends):.0e}" if ends else "none")
        for at in ("lr", "lr_over_batch"):
            errors = [run["relative_error"][at] for run in runs]
            cells.append(
                ", ".join(_short(100 * mean(e[of] for e in errors)) for of in ("mean", "median"))
            )
        rows.append([*_names(key), *cells])
    yield (
        "Slopes in ε of KL (2 expected) and of |KL - quadratic| (3 expected), as built and with "
        "SiLU for ReLU, mean ± std over seeds; how far the quadratic form is off: mean, median",
        header,
        rows,
    )
    header = ["model", "Fisher", "Spearman", "of the norm", "ratio", "lowest, highest"]
    rows = []
    for key, runs in grouped(results):
        if key[2] != "own":  # the other is there for the slopes
            continue
        for kind in KINDS:
            of = [run["diagonal"][kind] for run in runs]
            cells = [_spread([r[n] for r in of]) for n in ("spearman", "spearman_of_norm")]
            cells.append(_spread([r["ratio_median"] for r in of], ".2g"))
            low, high = min(r["ratio_min"] for r in of), max(r["ratio_max"] for r in of)
            rows.append([_names(key)[0], kind, *cells, f"{low:.2g}, {high:.2g}"])
    yield (
        "The diagonal form against the full one over sources: rank correlation, that of the "
        "gradient norm, and the median of diagonal / full: mean ± std over seeds",
        header,
        rows,
    )


def findings(results: Results) -> list[str]:
    """What the run shows, in sentences; the last is the verdict."""
    groups = dict(grouped(results))
    sentences = _divergences(results)
    if not groups:
        return sentences or ["Nothing was measured."]
    for (model, state, activation), runs in groups.items():
        if activation != "own":
            continue
        parts = [
            f"KL grows as {_order(runs, 'kl')}",
            f"|KL - quadratic| as {_order(runs, 'error')}",
        ]
        smooth = groups.get((model, state, "smooth"))
        if smooth:
            parts.append(f"with SiLU for ReLU as {_order(smooth, 'error')}")
        sentences.append(f"{model}, {state}: {', '.join(parts)}.")
    trained = [r for k, runs in groups.items() if k[1:] == ("trained", "own") for r in runs]
    sizes = _sizes(trained, _rates(results)) if trained else []
    return [*sentences, *sizes, _verdict(groups)]


def _divergences(results: Results) -> list[str]:
    epochs: dict[str, dict[int, int | None]] = {}
    for run in results["runs"]:
        epochs.setdefault(run["model"], {})[run["seed"]] = run.get("diverged", {}).get("epoch")
    return [text for item in epochs.items() for text in left_out(*item, "tables and figures")]


def _sizes(runs: list[Row], rates: tuple[float, float]) -> list[str]:
    """How good the approximations are where they are used: on trained networks as built."""
    whole, share = (
        _range([100 * run["relative_error"][at]["mean"] for run in runs])
        for at in ("lr", "lr_over_batch")
    )
    exact = [run["diagonal"]["exact"] for run in runs]
    ratio, ranks, norms = (
        _range([run[name] for run in exact])
        for name in ("ratio_median", "spearman", "spearman_of_norm")
    )
    return [
        f"Trained networks as built, all models and seeds: the quadratic form is off by {whole} % "
        f"at the learning rate {rates[0]:.2g}, and by {share} % at one sample's share of a batch's "
        f"step, {rates[1]:.2g} (means over sources).",
        f"There the diagonal form is {ratio} of the full one (medians over sources, exact Fisher); "
        f"their rank correlation over sources is {ranks}, that of the gradient norm with "
        f"the full form {norms}.",
    ]


def _verdict(groups: dict[Key, list[Row]]) -> str:
    counts = {}
    for activation in NETWORKS:
        every = [runs for key, runs in groups.items() if key[2] == activation]
        for name in EXPECTED:
            held = sum(_holds(runs, name) == "holds" for runs in every)
            counts[activation, name] = f"{held} of {len(every)}"
    return (
        f"Slopes within {TOLERANCE} in every seed, where the leading order is off by at most "
        f"{SMALL_ERROR:.0%}: KL as ε² in {counts['own', 'kl']} networks as built and in "
        f"{counts['smooth', 'kl']} with SiLU for ReLU; the error as ε³ in {counts['own', 'error']} "
        f"as built and in {counts['smooth', 'error']} with SiLU for ReLU."
    )


def grouped(results: Results) -> Iterator[tuple[Key, list[Row]]]:
    """The measurements of all seeds, by model, state and activation."""
    groups: dict[Key, list[Row]] = {}
    for run in results["runs"]:
        for found in _measurements(run):
            key = (run["model"], found["state"], found["activation"])
            groups.setdefault(key, []).append(found)
    yield from groups.items()


def draw(results: Results) -> Figure:
    """A panel for each model and state: mean divergences against ε, one thin line a seed."""
    groups = dict(grouped(results))
    models, states = (list(dict.fromkeys(key[i] for key in groups)) for i in (0, 1))
    size = (1.2 + 3.3 * len(models), 0.8 + 3.1 * len(states))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(states), len(models), sharex=True, sharey=True, squeeze=False)
    for row, state in zip(axes, states, strict=True):
        for panel, model in zip(row, models, strict=True):
            _panel(panel, groups, model, state)
            panel.set_title(f"{model}, {state}")
        row[0].set_ylabel("mean over pairs (nats)")
    for panel in axes[-1]:
        panel.set_xlabel("step size ε")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


def _panel(panel: Axes, groups: dict[Key, list[Row]], model: str, state: str) -> None:
    for activation, name, label, colour, dash in _LINES:
        for i, run in enumerate(groups.get((model, state, activation), [])):
            steps, values = run["steps"], run[name]
            panel.plot(
                steps, values, color=colour, linestyle=dash, linewidth=1, label="" if i else label
            )
            if name != "error":
                continue
            fitted = [j for j, step in enumerate(steps) if step in run["fitted"]]
            points = [[series[j] for j in fitted] for series in (steps, values)]
            panel.plot(*points, "o", color=colour, markersize=2.5)
    panel.set_xscale("log")
    panel.set_yscale("log")
    runs = [run for key, found in groups.items() if key[:2] == (model, state) for run in found]
    starts = {
        "kl": 10 * max(run["kl"][0] for run in runs),  # above the curves, and below them
        "error": min(run["error"][0] for run in runs) / 10,
    }
    steps = runs[0]["steps"]
    for name, power in EXPECTED.items():
        start = starts[name]
        ends = [start, start * (steps[-1] / steps[0]) ** power]
        panel.plot([steps[0], steps[-1]], ends, color="#888888", linestyle=":", linewidth=1)
        panel.annotate(
            f"slope {power}",
            (steps[0], start),
            xytext=(0, 16) if name == "kl" else (14, -2),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color="#555555",
        )


def _measurements(run: Row) -> list[Row]:
    found: list[Row] = run.get("measurements", [])  # a run that diverged has none
    return found


def _rates(results: Results) -> tuple[float, float]:
    config = results["config"]
    return config["lr"], config["lr"] / config["batch_size"]


def _names(key: Key) -> list[str]:
    model, state, activation = key
    return [f"{model}, {state}", NETWORKS[activation]]


def _holds(runs: list[Row], name: str) -> str:
    slopes = [run["slopes"][name] for run in runs]
    if None in slopes:
        return "cannot be told: too few steps in the range"
    held = sum(abs(slope - EXPECTED[name]) <= TOLERANCE for slope in slopes)
    if 0 < held < len(slopes):
        return f"holds in {held} of {len(slopes)} seeds"
    return "holds" if held else "does not hold"


def _order(runs: list[Row], name: str) -> str:
    slopes = [run["slopes"][name] for run in runs]
    return f"ε^{_spread(slopes)} ({EXPECTED[name]}: {_holds(runs, name)})"


def _spread(found: list[float | None], form: str = ".2f") -> str:
    """Mean ± standard deviation of the numbers there are."""
    numbers = [number for number in found if number is not None]
    if not numbers:
        return "none"
    return summarise(numbers).show(lambda number: f"{number:{form}}")


def _range(numbers: list[float]) -> str:
    return " to ".join(dict.fromkeys(_short(number) for number in (min(numbers), max(numbers))))


def _short(number: float) -> str:
    """Two digits, without an exponent where there need be none: 150, 1.7, 0.0024."""
    return f"{float(f'{number:.2g}'):g}"
