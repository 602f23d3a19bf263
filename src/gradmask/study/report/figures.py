"""Figures of a comparison."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradmask.recipes.claims import FORMS, forms, series
from gradmask.study.arms import arm_colours, arm_title, baseline, parse_arm
from gradmask.study.results import without_diverged
from gradmask.study.statistics import (
    JUDGED,
    METRICS,
    Results,
    arms,
    compare_arms,
    values,
)

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
        figures |= {"influence": _influence(results), "kept": _kept(results)}
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
    """Epochs, and an array (runs, epochs) of one measurement."""
    runs = [run["epochs"] for run in results["runs"] if run["arm"] == arm]
    epochs = np.array([row["epoch"] for row in runs[0]])
    return epochs, np.array([[row[key] for row in rows] for rows in runs])


def _curves(results: Results) -> Figure:
    """Mean over seeds, with a band of one standard deviation."""
    panels = [
        ("test_accuracy", "Test accuracy (%)", 100.0),
        ("test_loss", "Test loss", 1.0),
        ("train_loss", "Train loss", 1.0),
        ("val_accuracy", "Validation accuracy (%)", 100.0),
    ]
    if all("memorised" in row for run in results["runs"] for row in run["epochs"]):
        panels[-1] = ("memorised", "Wrong training labels memorised (%)", 100.0)
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, 2).flat
    colours = arm_colours(arms(results))
    for panel, (key, title, scale) in zip(axes, panels, strict=True):
        for arm in arms(results):
            epochs, series = _series(results, arm, key)
            band(panel, epochs, series * scale, colours[arm], arm_title(arm))
        panel.set_title(title)
        panel.set_xlabel("epoch")
        if key == "test_loss":
            _clip_early_peaks(panel, results)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


def band(axes: Axes, x: np.ndarray, series: np.ndarray, colour: str, label: str) -> None:
    """The mean of several runs (runs, points) as a line, one standard deviation as a band."""
    mean = series.mean(0)
    axes.plot(x, mean, color=colour, label=label, linewidth=1.6)
    if len(series) > 1:
        std = series.std(0, ddof=1)
        axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)


def _clip_early_peaks(axes: Axes, results: Results) -> None:
    """A high learning rate makes the first epochs' test loss jump: keep the rest readable."""
    series = [_series(results, arm, "test_loss")[1] for arm in arms(results)]
    later = [s[:, s.shape[1] // 5 :] for s in series]
    low, high = min(s.min() for s in series), max(s.max() for s in later)
    axes.set_ylim(low - 0.05 * (high - low), min(high * 1.1, 3 * np.median(later[0]) + high / 2))


def _differences(results: Results) -> Figure | None:
    """Each arm against no mask: one dot a seed, the mean and its 95 % interval."""
    present = arms(results)
    others = [arm for arm in present if arm != baseline(arm) and baseline(arm) in present]
    if not others:
        return None
    colours = arm_colours(present)
    figure = Figure(figsize=(10, 0.9 + 0.42 * len(others)), layout="constrained")
    judged = [metric for metric in METRICS if metric.name in JUDGED]
    for axes, metric in zip(figure.subplots(1, len(judged), sharey=True), judged, strict=True):
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
        unit = "Test accuracy (points)" if metric.percent else "Test loss"
        axes.set_title(f"{unit}: {better} is better")
        axes.set_yticks(range(len(others)), [arm_title(arm) for arm in others])
        axes.set_ylim(len(others) - 0.5, -0.5)
    return figure


def _kept(results: Results) -> Figure | None:
    """Share of every parameter tensor that the first Fisher mask keeps, epoch by epoch."""
    masks = [arm for arm in arms(results) if parse_arm(arm).strategy == "fisher"]
    if not masks:
        return None
    runs = [run["epochs"] for run in results["runs"] if run["arm"] == masks[0]]
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


def _influence(results: Results) -> Figure | None:
    """Every form measured, the quadratic one per squared gradient norm, and the test loss."""
    measured = forms(results)
    if not measured:
        return None
    panels = [(f"{FORMS[form]}, nats", form, "") for form in measured]
    panels.append(("½ ε² ‖g‖², squared gradient norm", "squared_norm", ""))
    panels.append((f"{FORMS[measured[0]]} ÷ ½ ε² ‖g‖²", measured[0], "squared_norm"))
    rows = len(panels) // 2 + 1
    figure = Figure(figsize=(10, 3.2 * rows), layout="constrained")
    colours = arm_colours(arms(results))
    *axes, last = figure.subplots(rows, 2).flat[: len(panels) + 1]
    for panel, (title, name, divisor) in zip(axes, panels, strict=True):
        for arm in arms(results):
            runs = series(results, arm, name).values()
            values = np.array([values for _, values in runs])
            if divisor:
                norms = series(results, arm, divisor).values()
                values /= np.array([values for _, values in norms])
            # The mean and standard deviation of the logarithm, so that a band stays positive.
            logs = np.log10(np.maximum(values, 1e-300))
            band(panel, next(iter(runs))[0], logs, colours[arm], arm_title(arm))
        _powers_of_ten(panel)
        panel.set_title(title)
        panel.set_xlabel("epoch")
    for arm in arms(results):
        epochs, losses = _series(results, arm, "test_loss")
        band(last, epochs, losses, colours[arm], arm_title(arm))
    last.set_title("Test loss")
    last.set_xlabel("epoch")
    for spare in figure.axes[len(panels) + 1 :]:
        spare.remove()
    handles, labels = last.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)))
    return figure


def _powers_of_ten(axes: Axes) -> None:
    low, high = axes.get_ylim()
    step = max(1, round((high - low) / 5))
    powers = range(int(np.floor(low)), int(np.ceil(high)) + 1, step)
    axes.set_yticks(list(powers), [f"1e{power}" for power in powers])
