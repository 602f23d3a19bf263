"""The report of a comparison: the terminal's table, and one self-contained HTML page."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradmask.study.arms import arm_colours, arm_title, baseline
from gradmask.study.files import write_atomically
from gradmask.study.folder import check_ours
from gradmask.study.metrics import Metric
from gradmask.study.report.figures import draw_all, to_png, to_svg
from gradmask.study.report.tables import to_csv
from gradmask.study.statistics import (
    Results,
    arms,
    available,
    compare_arms,
    divergences,
    summarise,
    values,
)
from gradmask.study.verdicts import conclusions, sentences


def write_report(folder: Path, results: Results) -> Path:
    """Write `report.html`, the figures as SVG and PNG files, and the numbers as CSV files.

    Args:
        folder: The comparison's output folder.
        results: Contents of its `results.json`.

    Returns:
        Path of the page.
    """
    check_ours(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    figures: dict[str, str] = {}
    for name, figure in draw_all(results).items():
        figures[name] = to_svg(name, figure)
        write_atomically(folder / "figures" / f"{name}.svg", figures[name])
        write_atomically(folder / "figures" / f"{name}.png", to_png(figure))
    for name, table in to_csv(results).items():
        write_atomically(folder / f"{name}.csv", table)
    template = templates().get_template("report.html.j2")
    page = template.render(
        results=results,
        config=results["config"],
        yaml=yaml.safe_dump(results["config"], sort_keys=False, default_flow_style=None),
        metrics=available(results),
        rows=_table(results, available(results)),
        differences=_differences(results),
        colours=arm_colours(arms(results)),
        sentences=sentences(results),
        conclusion="\n".join(conclusions(results)),
        diverged=divergences(results),
        figures={name: Markup(svg) for name, svg in figures.items()},
        minutes=sum(run["seconds"] for run in results["runs"]) / 60,
    )
    path = folder / "report.html"
    write_atomically(path, page)
    return path


def templates() -> Environment:
    """The templates of pages; what they are given is escaped."""
    return Environment(
        loader=PackageLoader("gradmask.study.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def print_summary(results: Results, console: Console) -> None:
    """Print the table of means and the verdicts.

    Args:
        results: Contents of `results.json`.
        console: Where to print.
    """
    unlimited = console.options.update(width=1000)
    metrics, left_out = available(results), []
    table = _terminal_table(results, metrics)
    while console.measure(table, options=unlimited).maximum > console.width and metrics[1:]:
        left_out.append(metrics.pop())
        table = _terminal_table(results, metrics)
    console.print(table)
    if left_out:
        titles = ", ".join(metric.name for metric in left_out)
        console.print(f"Left out on this narrow terminal: {titles}.", style="dim")
    show = partial(console.print, highlight=False, markup=False)
    for sentence in sentences(results):
        show(sentence)
    for sentence in conclusions(results):
        show(sentence, style="bold")


def _terminal_table(results: Results, metrics: list[Metric]) -> Table:
    table = Table(title="Mean ± std over seeds")
    table.add_column("arm", no_wrap=True)
    for metric in metrics:
        table.add_column(metric.name, justify="right", no_wrap=True)
    for row in _table(results, metrics):
        cells = [Text(c["text"], style="bold" if c["best"] else "") for c in row["cells"]]
        table.add_row(Text(row["title"]), *cells)
    return table


def _table(results: Results, metrics: list[Metric]) -> list[dict[str, Any]]:
    """Rows of `mean ± std` texts; the best mean of each column is marked."""
    best = {m.name: _best(results, m) for m in metrics}
    return [
        {
            "arm": arm,
            "title": arm_title(arm),
            "n": max((len(values(results, arm, m)) for m in metrics), default=0),
            "cells": [
                {"text": _mean_std(results, arm, m), "best": best[m.name] == arm} for m in metrics
            ],
        }
        for arm in arms(results)
    ]


def _best(results: Results, metric: Metric) -> str | None:
    if metric.higher_is_better is None or metric.key.startswith("train_"):
        return None
    found = {arm: list(values(results, arm, metric).values()) for arm in arms(results)}
    means = {arm: summarise(numbers).mean for arm, numbers in found.items() if numbers}
    pick = max if metric.higher_is_better else min
    return pick(means, key=means.__getitem__, default=None)


def _mean_std(results: Results, arm: str, metric: Metric) -> str:
    return summarise(list(values(results, arm, metric).values())).show(metric.show)


def _differences(results: Results) -> list[dict[str, Any]]:
    """Rows of paired differences to no mask; those whose interval excludes zero are marked."""
    rows = []
    for arm in arms(results):
        cells = []
        for metric in available(results):
            difference = compare_arms(results, arm, baseline(arm), metric)
            if arm == baseline(arm) or difference is None:
                continue
            interval = ""
            if difference.low is not None and difference.high is not None:
                low, high = (metric.show(x, signed=True) for x in (difference.low, difference.high))
                interval = f"[{low}, {high}]"
            mean = metric.show(difference.mean, signed=True)
            cells.append({"mean": mean, "interval": interval, "shown": difference.shown})
        if cells:
            rows.append({"arm": arm, "title": arm_title(arm), "cells": cells})
    return rows
