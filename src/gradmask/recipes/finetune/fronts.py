"""Fronts of the recipe `finetune`: the best on new classes for each share of the old that stays."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from gradmask.recipes.plots import STYLE, to_svg
from gradmask.study.arms import read_arm
from gradmask.study.files import write_atomically
from gradmask.study.results import Results, diverged_at
from gradmask.study.statistics import (
    Difference,
    Summary,
    corrected,
    paired_difference,
    summarise,
    value_key,
)

# Of the old accuracy: the front runs over these shares, and one of them is in the table.
SHARES = tuple(float(share) for share in np.linspace(0.85, 1.0, 31))
AT = 0.95
# What needs neither a mask nor old data.
SIMPLE = ("none", "probe", "frozen", "slow", "l2sp")
_COLUMNS = 4  # of the figure
_SIZE = ("keep", "penalty", "rank")  # options that a front runs over, beside the learning rate

Rows = dict[Any, dict[int, dict[str, float]]]  # by arm and rate, then by seed


@dataclass(frozen=True)
class Front:
    """What one kind of arm reaches over its learning rates and sizes.

    Attributes:
        name: The arm without its size.
        area: Mean over `SHARES` of the new accuracy reached where so much of the old is kept.
        new: New accuracy where `AT` of the old is kept.
        kept: Share of the old accuracy that is kept there.
        against: Paired difference of the area to the best simple arm's.
        curve: New accuracy reached at each of `SHARES`.
    """

    name: str
    area: Summary
    new: Summary
    kept: Summary
    against: Difference | None = None
    curve: tuple[Summary, ...] = ()


def fronts(results: Results) -> tuple[list[Front], str]:
    """The front of each kind of arm, chosen by validation images of the other seeds.

    For a share of the old accuracy, a seed takes the learning rate and size with the best new
    accuracy among those that keep the share, both as the other seeds' validation images have it;
    its own test images are what counts. The linear probe, which keeps all, is on every front.

    Args:
        results: Contents of `results.json`.

    Returns:
        Fronts by area, and the name of the best simple one.
    """
    kinds: dict[str, Rows] = defaultdict(dict)
    seeds: dict[int, None] = {}
    for run in results["runs"]:
        if diverged_at(run) is None:
            place = kinds[_kind(run["arm"])].setdefault((run["arm"], value_key(run)), {})
            place[run["seed"]] = run["epochs"][-1]
            seeds[run["seed"]] = None
    probe = kinds.get("probe", {})
    areas: dict[str, dict[int, float]] = {}
    found: dict[str, Front] = {}
    for name, rows in kinds.items():
        chosen: dict[int, list[dict[str, float]]] = {}
        for seed in seeds:
            picked = [_chosen(probe | rows, seed, list(seeds), share) for share in (*SHARES, AT)]
            there = [row for row in picked if row is not None]
            if len(there) == len(picked):
                chosen[seed] = there
        areas[name] = {
            seed: mean(row["test_new_accuracy"] for row in picked[:-1])
            for seed, picked in chosen.items()
        }
        at = [picked[-1] for picked in chosen.values()]
        found[name] = Front(
            name,
            summarise(list(areas[name].values())),
            summarise([row["test_new_accuracy"] for row in at]),
            summarise([row["test_kept"] for row in at]),
            curve=tuple(
                summarise([picked[i]["test_new_accuracy"] for picked in chosen.values()])
                for i in range(len(SHARES))
            ),
        )
    simple = [name for name in found if name in SIMPLE and areas[name]]
    best = max(simple, key=lambda name: found[name].area.mean, default="")
    others = [name for name in found if name != best]
    differences = corrected(
        [paired_difference(areas[name], areas[best]) if best else None for name in others]
    )
    against = dict(zip(others, differences, strict=True))
    all_fronts = [replace(front, against=against.get(name)) for name, front in found.items()]
    return sorted(all_fronts, key=lambda f: -f.area.mean), best


def _kind(arm: str) -> str:
    """An arm's name without its size."""
    found = read_arm(arm)
    options = [f"{k}={v}" for k, v in found.options.items() if k not in _SIZE]
    return ":".join([found.strategy, *options])


def _chosen(rows: Rows, seed: int, seeds: list[int], share: float) -> dict[str, float] | None:
    """The seed's own numbers at what the other seeds' validation images choose."""
    others = [s for s in seeds if s != seed] or [seed]
    best, most = None, -1.0
    for found in rows.values():
        if seed not in found or not all(s in found for s in others):
            continue
        kept, new = (mean(found[s][k] for s in others) for k in ("val_kept", "val_new_accuracy"))
        if kept >= share and new > most:
            best, most = found[seed], new
    return best


def print_fronts(results: Results, console: Console) -> None:
    """Print the fronts as a table, and which is the best, in a sentence.

    Args:
        results: Contents of `results.json`.
        console: Where.
    """
    found, best = fronts(results)
    if not best:
        console.print("No front: `probe` or another simple arm is needed.", highlight=False)
        return
    table = Table(title="Fronts over learning rates and sizes, new accuracy in %")
    table.add_column("arm")
    for title in ("area", f"at {AT:.0%} kept", "kept (%)", f"area against {best}, points", "p"):
        table.add_column(title, justify="right")
    for front in found:
        cells = [part.show(_percent) for part in (front.area, front.new, front.kept)]
        table.add_row(front.name, *cells, *_difference(front.against))
    console.print(table)
    console.print(sentence(found, best), highlight=False)


def draw_fronts(results: Results) -> Figure | None:
    """New accuracy against the share of the old that is kept, a panel for each kind of arm.

    Each panel has the best simple arm's front beside its own, with a standard deviation over seeds.

    Args:
        results: Contents of `results.json`.

    Returns:
        The figure; None without a front.
    """
    found, best = fronts(results)
    simple = next((front for front in found if front.name == best), None)
    others = [front for front in found if front.name != best]
    if simple is None or not others:
        return None
    rows = -(-len(others) // _COLUMNS)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3 * _COLUMNS, 2.1 * rows), layout="constrained")
        panels = figure.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False).flat
        for panel in panels[len(others) :]:
            panel.set_axis_off()
        for panel, front in zip(panels, others, strict=False):
            for one, color in ((simple, "0.45"), (front, "#0072b2")):
                middle = np.array([100 * point.mean for point in one.curve])
                spread = np.array([100 * (point.std or 0.0) for point in one.curve])
                kept = [100 * share for share in SHARES]
                panel.plot(kept, middle, color=color, label=one.name)
                panel.fill_between(kept, middle - spread, middle + spread, color=color, alpha=0.15)
            panel.set_title(front.name, fontsize=8.5)
        panels[0].legend(fontsize=7, loc="lower left")
        figure.supxlabel("old accuracy kept (%)", fontsize=9)
        figure.supylabel("new accuracy (%)", fontsize=9)
    return figure


def write_figure(folder: Path, results: Results) -> None:
    """Write `figures/fronts.svg` into the study's folder.

    Args:
        folder: The study's folder.
        results: Contents of `results.json`.
    """
    if figure := draw_fronts(results):
        (folder / "figures").mkdir(exist_ok=True)
        write_atomically(folder / "figures" / "fronts.svg", to_svg("fronts", figure))


def sentence(found: list[Front], best: str) -> str:
    """Which arm is best, and by how much over the best simple one.

    Args:
        found: What `fronts` returned, the best first.
        best: The best simple arm.
    """
    first = found[0]
    if first.name == best:
        return f"The best front is that of a simple arm, {best}."
    difference = first.against
    text = f"The best front is that of {first.name}"
    if difference is None or difference.low is None or difference.high is None:
        return f"{text}; with one seed nothing is shown."
    low, high = 100 * difference.low, 100 * difference.high
    shown = "shown" if difference.shown else "not shown"
    return (
        f"{text}: its area is {100 * difference.mean:+.1f} points from that of {best}, the best "
        f"simple one (95 % interval {low:+.1f} to {high:+.1f}, {difference.n} seeds): {shown}, "
        f"corrected for {len(found) - 1} comparisons."
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _difference(difference: Difference | None) -> tuple[str, str]:
    if difference is None or difference.low is None or difference.high is None:
        return "", ""
    low, high = 100 * difference.low, 100 * difference.high
    corrected = difference.corrected
    p = "" if corrected is None else f"{corrected:.2g}"
    return f"{100 * difference.mean:+.1f} ({low:+.1f} to {high:+.1f})", p
