"""Figures of a comparison."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradmask.study.arms import arm_colours, arm_title, baseline, read_arm
from gradmask.study.metrics import metrics_of
from gradmask.study.results import without_diverged
from gradmask.study.statistics import Results, arms, best_runs, compare_arms, values

STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.fonttype": "none",
}
_MAX_LABELS = 70


def draw_all(results: Results) -> dict[str, Figure]:
    """Draw every figure that the results have data for.

    Args:
        results: Contents of `results.json`.

    Returns:
        `{name: figure}`, in the order of the report; none if all runs diverged.
    """
    results = without_diverged(results)
    if not results["runs"]:
        return {}
    with mpl.rc_context(STYLE):
        figures = {"curves": _curves(results), "differences": _differences(results)}
        figures |= {"kept": _kept(results)}
    return {name: figure for name, figure in figures.items() if figure is not None}


def to_svg(name: str, figure: Figure) -> str:
    """SVG source of a figure, the same for the same figure; the name keeps its ids apart."""
    text = io.StringIO()
    # The salt keeps ids of figures on one page apart, and the same figure the same file.
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    used = set(re.findall(r"#([\w-]+)", svg))  # other ids would be double on one page
    return re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)


def to_png(figure: Figure) -> bytes:
    """PNG of a figure at a size for a page or a slide."""
    data = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(data, format="png", dpi=150, bbox_inches="tight")
    return data.getvalue()


def _series(results: Results, arm: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs, and an array (runs, epochs) of one measurement, NaN where a run has none."""
    runs = list(best_runs(results, arm).values())
    epochs = sorted({row["epoch"] for run in runs for row in run["epochs"] if key in row})
    rows = [{row["epoch"]: row.get(key, np.nan) for row in run["epochs"]} for run in runs]
    return np.array(epochs), np.array([[r.get(e, np.nan) for e in epochs] for r in rows])


def _curves(results: Results) -> Figure:
    """Mean over seeds, with a band of one standard deviation."""
    panels = list({m.key: m for m in metrics_of(results).shown}.values())[:6]
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 3.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, 2).flat)
    colours = arm_colours(arms(results))
    for panel, metric in zip(axes, panels, strict=False):
        for arm in arms(results):
            epochs, series = _series(results, arm, metric.key)
            scale = 100.0 if metric.percent else 1.0
            band(panel, epochs, series * scale, colours[arm], arm_title(arm))
        panel.set_title(metric.title)
        panel.set_xlabel("epoch")
    for spare in axes[len(panels) :]:
        spare.remove()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


def band(axes: Axes, x: np.ndarray, series: np.ndarray, colour: str, label: str) -> None:
    """The mean of several runs (runs, points) as a line, one standard deviation as a band."""
    mean = np.nanmean(series, 0)
    axes.plot(x, mean, color=colour, label=label, linewidth=1.6)
    if len(series) > 1:
        std = np.nanstd(series, 0, ddof=1)
        axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)


def _differences(results: Results) -> Figure | None:
    """Each arm against no mask: one dot a seed, the mean and its 95 % interval."""
    present = arms(results)
    others = [arm for arm in present if arm != baseline(arm) and baseline(arm) in present]
    if not others:
        return None
    colours = arm_colours(present)
    figure = Figure(figsize=(10, 0.9 + 0.42 * len(others)), layout="constrained")
    judged = metrics_of(results).judged
    if not judged:
        return None
    every = figure.subplots(1, len(judged), sharey=True, squeeze=False).flat
    for axes, metric in zip(every, judged, strict=True):
        scale = 100.0 if metric.percent else 1.0
        for row, arm in enumerate(others):
            ours, plain = (values(results, name, metric) for name in (arm, baseline(arm)))
            dots = [scale * (ours[seed] - plain[seed]) for seed in ours if seed in plain]
            axes.plot(dots, [row] * len(dots), "o", color=colours[arm], alpha=0.45, markersize=4)
            difference = compare_arms(results, arm, baseline(arm), metric)
            if difference is None:
                continue
            if difference.low is not None and difference.high is not None:
                ends = [scale * difference.low, scale * difference.high]
                axes.plot(ends, [row, row], color=colours[arm], linewidth=2)
            axes.plot(scale * difference.mean, row, "D", color=colours[arm], markersize=6)
        axes.axvline(0, color="#777777", linewidth=1)
        better = "right" if metric.higher_is_better else "left"
        axes.set_title(f"{metric.title}: {better} is better")
        axes.set_yticks(range(len(others)), [arm_title(arm) for arm in others])
        axes.set_ylim(len(others) - 0.5, -0.5)
    return figure


def _kept(results: Results) -> Figure | None:
    """Share of every parameter tensor that the first Fisher mask keeps, epoch by epoch."""
    masks = [arm for arm in arms(results) if read_arm(arm).strategy == "fisher"]
    if not masks:
        return None
    runs = [run["epochs"] for run in results["runs"] if run["arm"] == masks[0]]
    if not all("kept_per_parameter" in row for rows in runs for row in rows):
        return None
    shares = np.mean([[row["kept_per_parameter"] for row in rows] for rows in runs], axis=0).T
    names = [f"{name}  ({numel:,})" for name, numel in results["parameters"]]
    height = 1.2 + 0.19 * min(len(names), _MAX_LABELS)
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots()
    extent = (0.5, shares.shape[1] + 0.5, len(names) - 0.5, -0.5)
    image = axes.imshow(
        shares, aspect="auto", cmap="viridis", vmin=0, vmax=1, extent=extent, interpolation="none"
    )
    every = -(-len(names) // _MAX_LABELS)
    axes.set_yticks(range(0, len(names), every), names[::every], fontsize=7.5, parse_math=False)
    axes.grid(visible=False)
    axes.set_xlabel("epoch")
    axes.set_title(f"Share of each parameter tensor that learns under the {arm_title(masks[0])}")
    figure.colorbar(image, ax=axes, label="share kept", fraction=0.03, pad=0.01)
    return figure
