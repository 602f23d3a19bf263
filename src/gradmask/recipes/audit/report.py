"""The report of an audit: the terminal's table, and one self-contained HTML page."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from gradmask.recipes.audit.detection import Choice, Detection
from gradmask.recipes.audit.figures import contact_sheet, draw_detection
from gradmask.recipes.audit.run import Audited
from gradmask.recipes.audit.scores import AUDIT_SCORES, AuditScore
from gradmask.recipes.plots import STYLE, to_svg
from gradmask.study.files import write_atomically
from gradmask.study.options import to_yaml
from gradmask.study.report.rendering import templates
from gradmask.study.statistics import Difference, summarise


def write_audit_report(audited: Audited) -> Path:
    """Write `audit.html`, the figure and the contact sheet.

    Args:
        audited: What the audit found.

    Returns:
        Path of the page.
    """
    folder, detection = audited.options.place, audited.detection
    figure = ""
    if detection is not None:
        with mpl.rc_context(STYLE):
            figure = to_svg("detection", draw_detection(detection))
        write_atomically(folder / "detection.svg", figure)
    seed = detection.seeds[0] if detection else next(iter(audited.runs))
    sheet = contact_sheet(audited, seed)
    write_atomically(folder / f"contact-sheet-seed{seed}.png", sheet)
    page = (
        templates("gradmask.recipes.audit")
        .get_template("audit.html.j2")
        .render(
            config=audited.config,
            options=audited.options,
            detection=detection,
            samples=len(audited.runs[seed].data.train_labels),
            rows=_rows(detection) if detection else [],
            sentences=audit_verdicts(audited),
            ranked_by=describe(audited.choice),
            seed=seed,
            figure=Markup(figure),
            sheet=base64.b64encode(sheet).decode(),
            yaml=to_yaml(audited.options),
        )
    )
    path = folder / "audit.html"
    write_atomically(path, page)
    return path


def print_audit(audited: Audited, console: Console) -> None:
    """Print the table of scores and the verdict.

    Args:
        audited: What the audit found.
        console: Where to print.
    """
    detection = audited.detection
    if detection is not None:
        table = Table(title="Finding the wrong labels: mean ± std over seeds", padding=(0, 0))
        table.add_column("score", no_wrap=True)
        table.add_column("epochs", no_wrap=True)
        table.add_column("order", no_wrap=True)
        table.add_column("AUROC", justify="right", no_wrap=True)
        for k in detection.ks:
            table.add_column(f"P@{k}", justify="right", no_wrap=True)
        rows = _rows(detection)
        for row, following in zip(rows, [*rows[1:], None], strict=True):
            last = following is not None and following["baseline"] != row["baseline"]
            cells = [row["title"], row["rule"], row["order"], *row["cells"]]
            style = "bold" if row["best"] else None
            table.add_row(*cells, style=style, end_section=last)
        console.print(table)
    for sentence in audit_verdicts(audited):
        console.print(sentence, highlight=False, markup=False)


def audit_verdicts(audited: Audited) -> list[str]:
    """Say in plain sentences what the audit found.

    Args:
        audited: What the audit found.

    Returns:
        The sentences, the conclusion last.
    """
    detection = audited.detection
    if detection is None:
        return [
            f"Samples are ranked by {describe(audited.choice)}. No wrong label is known, so how "
            "well this finds what is memorised has not been measured here."
        ]
    k = detection.ks[-1]
    if detection.chosen_on is None:
        where = f"One seed: the scores' epochs and orders are the usual ones, k = {k} wrong labels."
    else:
        where = (
            f"Epochs, orders and the best scores were chosen on seed {detection.chosen_on} and are "
            f"reported on {_listed(detection.seeds)}; k = {k} wrong labels."
        )
    influence, baseline = (
        describe(detection.choices[f]) for f in (detection.best, detection.best_baseline)
    )
    return [
        where,
        f"Best form of influence: {influence}. Best baseline: {baseline}.",
        f"AUROC: {_compared(detection.difference(), 3, 1.0, '')}",
        f"Precision@{k}: {_compared(detection.difference(k), 1, 100.0, ' points')}",
        _conclusion(detection),
    ]


def describe(choice: Choice) -> str:
    """A score with its epochs and order, in words."""
    order = "highest" if choice.high else "lowest"
    return f"{_form(choice.form).title} ({choice.rule}, {order} first)"


def _form(name: str) -> AuditScore:
    return next(form for form in AUDIT_SCORES if form.name == name)


def _compared(difference: Difference | None, digits: int, scale: float, unit: str) -> str:
    assert difference is not None
    text = f"influence is {scale * difference.mean:+.{digits}f}{unit} against the baseline"
    if difference.low is None or difference.high is None:
        return f"{text}, from one seed: no interval, so nothing is shown."
    low, high = (f"{scale * end:+.{digits}f}" for end in (difference.low, difference.high))
    return f"{text} (95 % interval {low} to {high}, {difference.n} seeds): {_word(difference)}."


def _word(difference: Difference) -> str:
    if not difference.shown:
        return "no difference shown"
    return "better" if difference.mean > 0 else "worse"


def _conclusion(detection: Detection) -> str:
    difference = detection.difference()
    assert difference is not None
    found = {
        "better": "finds the wrong labels better than the best baseline does",
        "worse": "finds the wrong labels worse than the best baseline does",
        "no difference shown": "is not shown to find the wrong labels better or worse than the "
        "best baseline does",
    }[_word(difference)]
    return f"Conclusion: influence {found}, by AUROC."


def _listed(seeds: tuple[int, ...]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _rows(detection: Detection) -> list[dict[str, Any]]:
    """One row for each score, baselines first."""
    rows = []
    for form in AUDIT_SCORES:
        choice = detection.choices[form.name]
        numbers = [(detection.aurocs[form.name], 1.0, 3)]
        numbers += [(detection.precisions[form.name][k], 100.0, 1) for k in detection.ks]
        rows.append(
            {
                "title": form.title,
                "baseline": form.baseline,
                "rule": choice.rule,
                "order": "high" if choice.high else "low",
                "expected": "high" if form.expected_high else "low",
                "cells": [_mean_std(values, scale, digits) for values, scale, digits in numbers],
                "best": form.name in (detection.best, detection.best_baseline),
            }
        )
    return rows


def _mean_std(values: dict[int, float], scale: float, digits: int) -> str:
    numbers = [scale * value for value in values.values()]
    return summarise(numbers).show(lambda value: f"{value:.{digits}f}")
