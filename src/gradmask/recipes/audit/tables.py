"""What an audit by dynamics leaves: files of each run, and a table in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gradmask.audit.export import columns
from gradmask.audit.report import write_page
from gradmask.recipes.audit.dynamics import (
    BASELINE,
    COMBINED,
    RankedRun,
    as_images,
)
from gradmask.recipes.audit.options import DynamicsAudit
from gradmask.recipes.config import Comparison
from gradmask.study.environment import environment
from gradmask.study.files import write_json
from gradmask.study.folder import run_directory
from gradmask.study.options import to_plain
from gradmask.study.spec import Spec
from gradmask.study.statistics import paired_difference, summarise

VERSION = 1


def audit_folder(folder: Path, spec: Spec) -> Path:
    """Where the files of an audited run lie: each run has a folder of its own."""
    return folder / "audit" / run_directory(folder, spec).name


def write_audit(options: DynamicsAudit, config: Comparison, runs: list[RankedRun]) -> list[Path]:
    """Write `samples.csv`, `report.html` and `audit.json` of each run.

    Args:
        options: Options of the audit.
        config: Options of the runs.
        runs: The runs.

    Returns:
        The pages.
    """
    pages = []
    for run in runs:
        folder = audit_folder(options.folder, run.spec)
        folder.mkdir(parents=True, exist_ok=True)
        run.ranking.save(folder / "samples.csv")
        about = f"{config.model} on {config.data}, {run.spec.title}."
        page = folder / "report.html"
        pages.append(write_page(run.ranking, page, as_images(run.data), options.top, about))
        cut = run.ranking.threshold
        write_json(
            folder / "audit.json",
            {
                "version": VERSION,
                "audit": to_plain(options),
                "config": to_plain(config),
                "run": run.spec.as_row(),
                "environment": environment("cpu"),
                "detection": run.detection,
                "threshold": None if cut is None else vars(cut),
                "flagged": run.flagged(),
            },
        )
    return pages


def print_suspicious(run: RankedRun, console: Console, top: int = 10) -> None:
    """Print which samples come first.

    Args:
        run: The run.
        console: Where to print.
        top: How many.
    """
    table = Table(title=f"The most suspicious labels, {run.spec.title}")
    for title in ("sample", "label", "looks like"):
        table.add_column(title, overflow="fold")
    table.add_column("suspicion", justify="right")
    first = columns(run.ranking, run.ranking.order[:top])
    names = first.get("key", first["sample"])
    for cells in zip(names, first["label"], first["suggestion"], first["suspicion"], strict=True):
        table.add_row(*(escape(str(cell)) for cell in cells[:-1]), f"{cells[-1]:.3f}")
    console.print(table)
    console.print("All of them, of each run: samples.csv beside its report.", highlight=False)


def print_detection(runs: list[RankedRun], console: Console) -> None:
    """Print how well each score finds the labels that are known to be wrong, if there are some.

    Args:
        runs: The runs.
        console: Where to print.
    """
    for sentence in _flagged(runs):
        console.print(sentence, highlight=False)
    found = {run.spec: detection for run in runs if (detection := run.detection)}
    if not found:
        console.print("No wrong label is known, so what this finds has not been measured here.")
        return
    table = Table(title="Finding the wrong labels: mean ± std over runs")
    table.add_column("score", no_wrap=True)
    for title in ("AUROC", "average precision"):
        table.add_column(title, justify="right", no_wrap=True)
    for name in next(iter(found.values())):
        cells = [
            summarise([d[name][key] for d in found.values()]).show(lambda value: f"{value:.3f}")
            for key in ("auroc", "average_precision")
        ]
        style = "bold" if name == COMBINED else None
        table.add_row(name.replace("_", " "), *cells, style=style, end_section=name == COMBINED)
    console.print(table)
    first, second = (
        {i: d[name]["auroc"] for i, d in enumerate(found.values())} for name in (COMBINED, BASELINE)
    )
    difference = paired_difference(first, second)
    if difference is not None and difference.low is not None and difference.high is not None:
        console.print(
            f"AUROC of the combined rank is {difference.mean:+.3f} against the loss of the last "
            f"epoch (95 % interval {difference.low:+.3f} to {difference.high:+.3f}, "
            f"{difference.n} runs).",
            highlight=False,
        )


def _flagged(runs: list[RankedRun]) -> list[str]:
    """Sentences about the flagged samples."""
    sentences = []
    for run in runs:
        ranking, cut = run.ranking, run.ranking.threshold
        count = int(ranking.flagged.sum())
        if cut is None and not count:
            continue
        text = f"{run.spec.title}: {count:,} of {int((~ranking.planted).sum()):,} labels flagged"
        if cut is not None:
            text += f"; about {cut.wrong_share:.0%} of all are estimated to be wrong"
            text += f", {cut.false_alarms:.0%} of the flagged to be right" if count else ""
        if known := run.flagged():
            text += f" (in truth {known['false_alarms']:.0%}; {known['found']:.0%} are found)"
        sentences.append(text + ".")
    return sentences or [
        "Nothing is flagged: train with --plant 0.05, by which a threshold is calibrated, or say "
        "what --share of the samples to flag."
    ]
