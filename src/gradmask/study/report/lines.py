"""Panels of lines, as specifications of Vega-Lite: means over seeds with bands."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from gradmask.study.report.parts import Look, Spec
from gradmask.study.statistics import summarise

# One run: the value at each epoch.
Series = Mapping[float, float]

HEIGHT = 240
NOT_HIDDEN = {"filter": "indexof(hidden, datum.arm) < 0"}  # by the legend


def arm_colour(looks: Sequence[Look]) -> Spec:
    """The encoding of arms by their colours, which the page's theme holds."""
    scale = {"domain": [look.title for look in looks]}
    return {"field": "arm", "type": "nominal", "title": None, "scale": scale}


def band_rows(
    runs: Mapping[str, Iterable[Series]],
    looks: Sequence[Look],
    show: Callable[[float], str],
    *,
    scale: float = 1.0,
    log: bool = False,
) -> list[dict[str, Any]]:
    """Mean ± standard deviation of several runs at every epoch that one of them has.

    Args:
        runs: Runs of each arm.
        looks: How arms look.
        show: How a value is written.
        scale: What values are multiplied by.
        log: Take mean and deviation of the logarithm, so that a band stays positive.

    Returns:
        One row for each arm and epoch: `mean`, `low`, `high`, the number of runs.
    """
    rows = []
    for look in looks:
        found = list(runs.get(look.arm, ()))
        for epoch in sorted({epoch for run in found for epoch in run}):
            here = [run[epoch] for run in found if math.isfinite(run.get(epoch, math.nan))]
            if not here:
                continue
            numbers = [math.log10(max(v, 1e-300)) if log else scale * v for v in here]
            middle, spread = mean(numbers), stdev(numbers) if len(numbers) > 1 else 0.0
            ends = (middle, middle - spread, middle + spread)
            middle, low, high = (short(10**end if log else end) for end in ends)
            text = show(10 ** mean(numbers)) if log else summarise(here).show(show)
            point = {"arm": look.title, "epoch": epoch, "shown": text, "seeds": len(here)}
            rows.append(point | {"mean": middle, "low": low, "high": high})
    return rows


def line_panel(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    looks: Sequence[Look],
    *,
    domain: tuple[float, float] | None = None,
    log: bool = False,
    index: int = 0,
) -> Spec:
    """Lines with bands, and the values nearest to the pointer.

    Args:
        title: What stands above the panel.
        rows: What `band_rows` returned.
        looks: How arms look.
        domain: Ends of the vertical axis.
        log: Give it a logarithmic scale.
        index: Its place in the figure.

    Returns:
        The panel.
    """
    scale: Spec = {"type": "log"} if log else {"zero": False, "nice": domain is None}
    if domain is not None:
        scale["domain"] = list(domain)
    # Clipped only where something is cut: files of clipped marks take seconds to draw.
    clip = domain is not None and any(row["high"] > domain[1] for row in rows)
    axis = {"format": ".0e", "values": _powers(rows)} if log else {"tickCount": 5}
    y = {"field": "mean", "type": "quantitative", "title": None, "scale": scale, "axis": axis}
    colour = arm_colour(looks)
    dashes = {"domain": colour["scale"]["domain"], "range": [list(look.dash) for look in looks]}
    single = len({row["epoch"] for row in rows}) < 2  # a line of one point is not seen
    name = f"near{index}"
    near = {"param": name, "empty": False}
    return {
        "title": title,
        "height": HEIGHT,
        "data": {"values": list(rows)},
        "transform": [NOT_HIDDEN],
        "encoding": {
            "x": {
                "field": "epoch",
                "type": "quantitative",
                "axis": {"tickMinStep": 1, "grid": False},
                "scale": {"zero": False, "nice": False, "padding": 4},
            },
            "color": colour,
        },
        "layer": [
            {
                "mark": {"type": "area", "fillOpacity": 0.14, "clip": clip},
                "encoding": {"y": y | {"field": "low"}, "y2": {"field": "high"}},
            },
            {
                "mark": {"type": "line", "strokeWidth": 1.8, "clip": clip, "point": single},
                "encoding": {"y": y, "strokeDash": colour | {"scale": dashes}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 70, "clip": clip},
                "params": [nearest(name)],
                "encoding": {
                    "y": y,
                    "opacity": {"condition": near | {"value": 1}, "value": 0},
                    "tooltip": tooltip(arm="arm", epoch="epoch", shown="mean ± std", seeds="seeds"),
                },
            },
        ],
    }


def _powers(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Powers of ten on a logarithmic axis, about five."""
    low, high = min(row["low"] for row in rows), max(row["high"] for row in rows)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, last + 1, max(1, round((last - first) / 5)))]


def nearest(name: str) -> Spec:
    """A selection of the point that is nearest to the pointer."""
    select = {"type": "point", "on": "pointerover", "nearest": True, "clear": "pointerout"}
    return {"name": name, "select": select}


def tooltip(**fields: str) -> list[Spec]:
    """What is shown under the pointer: titles by field."""
    return [{"field": f, "type": "nominal", "title": title} for f, title in fields.items()]


def short(value: float) -> float:
    """A number as exact as a figure can show it."""
    return float(f"{value:.6g}")
