"""A sweep: the front of two metrics over its values, and the values that validation chooses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from gradmask.study.metrics import Metric, metrics_of
from gradmask.study.report.lines import NOT_HIDDEN, arm_colour, short, tooltip
from gradmask.study.report.parts import Cell, Figure, Look, Spec, Table
from gradmask.study.results import Row, diverged_at, values_of
from gradmask.study.statistics import Results, best_runs, summarise, value_key


def front(results: Results, looks: Sequence[Look]) -> Figure | None:
    """Two metrics against each other, each arm at every value of the sweep."""
    metrics = metrics_of(results)
    if len(metrics.front) < 2 or not any(values_of(run) for run in results["runs"]):
        return None
    axes = dict(zip("xy", metrics.front, strict=False))
    rows = []
    for look in looks:
        chosen = [value_key(run) for run in best_runs(results, look.arm, metrics.chooser).values()]
        runs: dict[str, list[dict[str, Any]]] = {}
        for run in results["runs"]:
            if run["arm"] == look.arm and diverged_at(run) is None:
                runs.setdefault(value_key(run), []).append(run)
        for order, (key, found) in enumerate(runs.items()):
            words = values_words(found[0])
            row = {"arm": look.title, "order": order, "values": words, "chosen": chosen.count(key)}
            for axis, metric in axes.items():
                scale = metric.scale
                summary = summarise([metric.of(run["epochs"]) for run in found])
                spread = summary.std or 0.0
                row[axis] = short(scale * summary.mean)
                row[f"{axis}low"] = short(scale * (summary.mean - spread))
                row[f"{axis}high"] = short(scale * (summary.mean + spread))
                row[f"{axis}shown"] = summary.show(metric.show)
            rows.append(row)
    panel = _front_panel(rows, axes, looks, line=len(values_of(results["runs"][0])) == 1)
    arms = [look.arm for look in looks]
    return Figure("front", "Two metrics over the sweep", [panel], 1, arms, file_width=640)


def _front_panel(
    rows: list[dict[str, Any]], axes: Mapping[str, Metric], looks: Sequence[Look], *, line: bool
) -> Spec:
    encodings = {
        axis: {
            "field": axis,
            "type": "quantitative",
            "scale": {"zero": False},
            "axis": {"tickCount": 7},
            "title": f"{metric.words}{' (%)' if metric.percent else ''}",
        }
        for axis, metric in axes.items()
    }
    x, y = encodings["x"], encodings["y"]
    lines: list[Spec] = [
        {
            "mark": {"type": "line", "strokeWidth": 1.6},
            "encoding": {"x": x, "y": y, "order": {"field": "order"}},
        }
    ]
    shape = {"condition": {"test": "datum.chosen > 0", "value": "diamond"}, "value": "circle"}
    return {
        "height": 380,
        "data": {"values": rows},
        "transform": [NOT_HIDDEN],
        "encoding": {"color": arm_colour(looks)},
        "layer": [
            *(lines if line else []),
            {
                "mark": {"type": "rule", "opacity": 0.45},
                "encoding": {"x": x | {"field": "xlow"}, "x2": {"field": "xhigh"}, "y": y},
            },
            {
                "mark": {"type": "rule", "opacity": 0.45},
                "encoding": {"y": y | {"field": "ylow"}, "y2": {"field": "yhigh"}, "x": x},
            },
            {
                "mark": {"type": "point", "filled": True, "opacity": 1},
                "encoding": {
                    "x": x,
                    "y": y,
                    "shape": shape,
                    "size": {"condition": {"test": "datum.chosen > 0", "value": 150}, "value": 70},
                    "tooltip": tooltip(
                        arm="arm",
                        values="values",
                        xshown=axes["x"].heading,
                        yshown=axes["y"].heading,
                        chosen="seeds that chose it",
                    ),
                },
            },
        ],
    }


def values_table(results: Results, looks: Sequence[Look]) -> Table:
    """The metric of validation at every value, and how many seeds chose each."""
    metrics = metrics_of(results)
    every = dict.fromkeys(value_key(run) for run in results["runs"])
    words = {value_key(run): values_words(run) for run in results["runs"]}
    rows = []
    for look in looks:
        chosen = [value_key(run) for run in best_runs(results, look.arm, metrics.chooser).values()]
        cells = [Cell(look.title, look.title, arm=look.arm)]
        for key in every:
            found = [
                metrics.validation.of(run["epochs"])
                for run in results["runs"]
                if metrics.validation and run["arm"] == look.arm and value_key(run) == key
                if diverged_at(run) is None
            ]
            summary = summarise(found)
            text = summary.show(metrics.validation.show) if metrics.validation else "-"
            count = chosen.count(key)
            more = f"chosen by {count} of {len(chosen)} seeds" if count else ""
            cells.append(Cell(text, summary.mean, "best" if count else "", more=more))
        rows.append(cells)
    title = f"{metrics.validation.words} at every value" if metrics.validation else ""
    return Table(title, ["arm", *(words[key] for key in every)], rows)


def chosen_words(results: Results, arm: str) -> str:
    """The values of a sweep that validation chose for an arm, and for how many seeds each."""
    runs = best_runs(results, arm).values()
    chosen = Counter(map(values_words, runs)).most_common()
    return "; ".join(words if len(chosen) < 2 else f"{words} ({n})" for words, n in chosen)


def values_words(run: Row) -> str:
    """The values of a sweep that a run was made with."""
    return ", ".join(f"{name} {value}" for name, value in values_of(run).items())
