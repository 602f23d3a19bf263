"""Figures of a study, as specifications of Vega-Lite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from gradmask.study.arms import baseline, read_arm
from gradmask.study.metrics import Metric, metrics_of
from gradmask.study.report.lines import Series, arm_colour, band_rows, line_panel, short, tooltip
from gradmask.study.report.parts import Figure, Look, Spec
from gradmask.study.statistics import Results, best_runs, compare_arms, values

_TEXT = {"type": "text", "align": "left", "baseline": "bottom", "dy": -9, "fontSize": 12}


def curves(studies: Mapping[str, Results], looks: Sequence[Look]) -> Figure | None:
    """A panel for each metric and study, with the same vertical axis in all studies.

    Args:
        studies: Results by title; of a sweep the runs at the best values are drawn.
        looks: How arms look.

    Returns:
        The figure; None if there is nothing to draw.
    """
    metrics: dict[str, dict[str, Metric]] = {}  # by key and study: each has a scale of its own
    for name, results in studies.items():
        found = metrics_of(results)
        validation = (found.validation,) if found.validation else ()
        for metric in (*found.shown, *validation):
            metrics.setdefault(metric.key, {})[name] = metric
    panels: list[Spec] = []
    for own in metrics.values():
        metric = next(iter(own.values()))
        rows = {
            name: band_rows(_series(studies[name], m, looks), looks, m.show, scale=m.scale)
            for name, m in own.items()
        }
        domain = _domain([row for found in rows.values() for row in found], metric)
        for name, found_rows in rows.items():
            title = f"{metric.label}{' (%)' if own[name].percent else ''}"
            title = f"{title}: {name}" if len(studies) > 1 else title
            if found_rows:
                panels.append(
                    line_panel(title, found_rows, looks, domain=domain, index=len(panels))
                )
    columns = len(studies) if len(studies) > 1 else 2
    title = "Every metric over the epochs of training"
    arms = [look.arm for look in looks]
    return Figure("curves", title, panels, columns, arms) if panels else None


def _series(results: Results, metric: Metric, looks: Sequence[Look]) -> dict[str, list[Series]]:
    return {
        look.arm: [
            {row["epoch"]: row[metric.key] for row in run["epochs"] if metric.key in row}
            for run in best_runs(results, look.arm, metric.chooser).values()
        ]
        for look in looks
    }


def _domain(rows: Sequence[Mapping[str, Any]], metric: Metric) -> tuple[float, float] | None:
    """Ends of the axis; without the peaks of a loss in the first fifth of training."""
    if not rows:
        return None
    low, high = min(row["low"] for row in rows), max(row["high"] for row in rows)
    if not metric.higher_is_better:
        start = max(row["epoch"] for row in rows) / 5
        later = max((row["high"] for row in rows if row["epoch"] > start), default=high)
        if high - low > 4 * (later - low) > 0:
            high = low + 2 * (later - low)
    gap = 0.03 * (high - low)
    return (low - gap, high + gap) if gap else None


def differences(results: Results, looks: Sequence[Look]) -> Figure | None:
    """Each arm against no mask: one dot a seed, the mean and its 95 % interval."""
    present = [look.arm for look in looks]
    others = [
        look for look in looks if look.arm != baseline(look.arm) and baseline(look.arm) in present
    ]
    panels = []
    for metric in metrics_of(results).judged:
        rows = [row for look in others for row in _difference_rows(results, look, metric)]
        if rows:
            better = "right" if metric.higher_is_better else "left"
            unit = " (points)" if metric.percent else ""
            title = [f"{metric.label}{unit}", f"{metric.at} epoch; {better} is better"]
            panels.append(_difference_panel(title, rows, looks))
    if not panels:
        return None
    return Figure("differences", "Difference of each arm to no mask, for every seed", panels)


def _difference_rows(results: Results, look: Look, metric: Metric) -> list[dict[str, Any]]:
    scale = metric.scale
    arm, plain = look.arm, baseline(look.arm)
    difference = compare_arms(results, arm, plain, metric)
    if difference is None:
        return []
    values_of_arm, values_of_plain = values(results, arm, metric), values(results, plain, metric)
    pairs = {
        seed: values_of_arm[seed] - values_of_plain[seed]
        for seed in values_of_arm
        if seed in values_of_plain
    }
    rows: list[dict[str, Any]] = [
        {
            "arm": look.title,
            "seed": seed,
            "dot": short(scale * value),
            "shown": metric.show(value, signed=True),
        }
        for seed, value in pairs.items()
    ]
    text = metric.show(difference.mean, signed=True)
    row = {"arm": look.title, "mean": short(scale * difference.mean)}
    if difference.low is not None and difference.high is not None:
        low, high = difference.low, difference.high
        ends = f"{metric.show(low, signed=True)} to {metric.show(high, signed=True)}"
        row |= {"low": short(scale * low), "high": short(scale * high), "interval": ends}
    return [*rows, row | {"shown": text}]


def _difference_panel(title: list[str], rows: list[dict[str, Any]], looks: Sequence[Look]) -> Spec:
    order = list(dict.fromkeys(row["arm"] for row in rows))
    x = {"type": "quantitative", "title": None, "scale": {"zero": True}, "axis": {"tickCount": 6}}
    return {
        "title": {"text": title[0], "subtitle": title[1]},
        "height": 42 * len(order),
        "data": {"values": rows},
        "encoding": {
            "y": {"field": "arm", "type": "nominal", "sort": order, "axis": None},
            "color": arm_colour(looks) | {"legend": None},
        },
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 1},
                "data": {"values": [{"zero": 0}]},
                "encoding": {"x": x | {"field": "zero"}, "y": None, "color": {"value": "#8a919e"}},
            },
            {
                "mark": _TEXT,
                "transform": [{"filter": "isValid(datum.mean)"}],
                "encoding": {"x": {"value": 0}, "text": {"field": "arm"}, "color": None},
            },
            {
                "mark": {"type": "rule", "strokeWidth": 2},
                "transform": [{"filter": "isValid(datum.low)"}],
                "encoding": {"x": x | {"field": "low"}, "x2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 34, "opacity": 0.45},
                "transform": [{"filter": "isValid(datum.dot)"}],
                "encoding": {
                    "x": x | {"field": "dot"},
                    "tooltip": tooltip(arm="arm", shown="difference", seed="seed"),
                },
            },
            {
                "mark": {
                    "type": "point",
                    "filled": True,
                    "size": 90,
                    "shape": "diamond",
                    "opacity": 1,
                },
                "transform": [{"filter": "isValid(datum.mean)"}],
                "encoding": {
                    "x": x | {"field": "mean"},
                    "tooltip": tooltip(arm="arm", shown="mean", interval="95 % interval"),
                },
            },
        ],
    }


def kept(results: Results, looks: Sequence[Look]) -> Figure | None:
    """Share of every parameter tensor that learns, epoch by epoch, under each measured mask."""
    names = [f"{name} ({entries:,})" for name, entries in results.get("parameters", ())]
    rows, shown, chooser = [], [], metrics_of(results).chooser
    for look in looks:
        is_method = read_arm(look.arm).is_method
        runs = best_runs(results, look.arm, chooser).values() if is_method else ()
        key = "kept_per_parameter"
        shares: dict[float, list[list[float]]] = {}
        for row in (row for run in runs for row in run["epochs"] if key in row):
            shares.setdefault(row["epoch"], []).append(row[key])
        lengths = {len(one) for found in shares.values() for one in found}
        if len(lengths) != 1:
            continue
        tensors = lengths.pop()
        labels = names if len(names) == tensors else [f"tensor {i + 1}" for i in range(tensors)]
        means = [[mean(column) for column in zip(*found, strict=True)] for found in shares.values()]
        for index, label in enumerate(labels):
            line = [round(share[index], 3) for share in means]
            rows.append({"arm": look.title, "layer": label, "epoch": list(shares), "share": line})
        shown.append(look.title)
    if not shown:
        return None
    select: dict[str, Any] = {"name": "which", "value": shown[0]}
    if len(shown) > 1:
        select["bind"] = {"input": "select", "options": shown, "name": "Arm "}
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    y = {"field": "layer", "type": "nominal", "sort": layers, "title": None}
    panel: Spec = {
        "title": {
            "text": "Share of each parameter tensor that learns",
            "subtitle": {"expr": "which"},
        },
        "height": len(layers) * max(4, min(14, 900 // len(layers))),
        "data": {"values": rows},
        "params": [select],
        "transform": [{"filter": "datum.arm == which"}, {"flatten": ["epoch", "share"]}],
        "mark": "rect",
        "encoding": {
            "x": {
                "field": "epoch",
                "type": "ordinal",
                "axis": {"labelAngle": 0, "labelOverlap": True},
            },
            "y": y | {"axis": {"labelLimit": 260, "labelOverlap": "greedy", "labelFontSize": 10}},
            "color": {
                "field": "share",
                "type": "quantitative",
                "scale": {"scheme": "viridis", "domain": [0, 1]},
                "legend": {"title": None, "format": ".0%", "orient": "right"},
            },
            "tooltip": [
                *tooltip(layer="tensor", epoch="epoch"),
                {"field": "share", "type": "quantitative", "format": ".1%", "title": "share kept"},
            ],
        },
    }
    return Figure(
        "kept", "Share of each tensor that learns", [panel], 1, file_width=640, least_width=560
    )
