"""The report of an image comparison: that of its study, and the paper's claims on influence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from gradmask.recipes.claims import FORMS, conclusion, findings, forms, series
from gradmask.recipes.learnt import not_learnt
from gradmask.study import report
from gradmask.study.report.lines import Series, band_rows, line_panel
from gradmask.study.report.parts import Figure, Look, Section, looks
from gradmask.study.results import without_diverged
from gradmask.study.statistics import Results, arms
from gradmask.study.verdicts import verdicts

_CLAIMS = "The paper's claims on influence in these runs:"


def write_report(folder: Path, results: Results) -> Path:
    """Write the report of a study; that of an image comparison says what its data are.

    Args:
        folder: The study's output folder.
        results: Contents of its `results.json`.

    Returns:
        Path of the page.
    """
    if "data" not in results:  # of a training function of the user's own
        return report.write_report(folder, results)
    found = findings(results)
    influence = [section for section in (_influence(results, found),) if section is not None]
    masked = bool(verdicts(results)) or not found
    notes = ["Train loss is the mean over an epoch's batches, as they were trained on."]
    if results["config"]["label_noise"]:
        notes.append("Memorised: share of the wrong training labels that the network predicts.")
    unlearnt = not_learnt(results)
    return report.write_report(
        folder,
        results,
        title=None if masked else "What does influence show?",
        subtitle=_subtitle(results),
        conclusion=unlearnt or ([] if masked else conclusion(found).splitlines()),
        notes=notes,
        sections=influence,
        judged=not unlearnt,
    )


def print_summary(results: Results, console: Console) -> None:
    """Print what a study shows, and on which of the paper's claims it bears.

    Args:
        results: Contents of `results.json`.
        console: Where to print.
    """
    if "data" not in results:
        report.print_summary(results, console)
        return
    unlearnt = not_learnt(results)
    report.print_summary(results, console, unlearnt, judged=not unlearnt)
    found = findings(results)
    if found:
        console.print(Text(_CLAIMS))
        console.print(Text(conclusion(found), style="bold"))


def _subtitle(results: Results) -> str:
    config, data = results["config"], results["data"]
    noise = config["label_noise"]
    wrong = f", {100 * noise:g} % wrong training labels" if noise else ""
    seeds = ", ".join(map(str, config["seeds"]))
    return (
        f"{config['model']} on {config['data']}: {data['train']} training, {data['validation']} "
        f"validation and {data['test']} test images, {data['classes']} classes{wrong}; "
        f"keep {config['keep']}, {config['epochs']} epochs, seeds {seeds}."
    )


def _influence(results: Results, found: Sequence[Any]) -> Section | None:
    results = without_diverged(results)
    measured = forms(results)
    if not found or not measured:
        return None
    config = results["config"]
    monitored = [run for run in results["runs"] if run.get("influence")]
    spent = sum(record["seconds"] for run in monitored for record in run["influence"])
    share = spent / sum(run["seconds"] for run in monitored)
    note = (
        f"How far one gradient step of size ε = {config['monitor_step']} on one of "
        f"{config['monitor_sources']} training images would move the predictions on "
        f"{config['monitor_probe']} others: mean over the images. Lines: geometric mean over "
        "seeds; bands: one standard deviation of the logarithm. Measuring took "
        f"{share:.1%} of the time of the runs. Intervals are Student's t over paired seeds, not "
        "corrected for the number of comparisons."
    )
    return Section(
        "Influence in training, and the paper's claims",
        text=conclusion(list(found)).splitlines(),
        figures=[_figure(results, measured)],
        notes=[note],
        folded=("Each claim, case by case", [finding.sentence for finding in found]),
    )


def _figure(results: Results, measured: Sequence[str]) -> Figure:
    """Every form measured, and the first one per squared gradient norm."""
    found = looks(arms(results))
    panels = [(f"{FORMS[form]}, nats", form, "") for form in measured]
    panels.append(("½ ε² ‖g‖², squared gradient norm", "squared_norm", ""))
    panels.append((f"{FORMS[measured[0]]} ÷ ½ ε² ‖g‖²", measured[0], "squared_norm"))
    drawn = []
    for index, (title, name, divisor) in enumerate(panels):
        runs = {look.arm: _runs(results, look, name, divisor) for look in found}
        rows = band_rows(runs, found, lambda value: f"{value:.3g}", log=True)
        drawn.append(line_panel(title, rows, found, log=True, index=index))
    return Figure("influence", "Influence in training", drawn, arms=arms(results))


def _runs(results: Results, look: Look, name: str, divisor: str) -> list[Series]:
    runs = series(results, look.arm, name)
    by = series(results, look.arm, divisor) if divisor else {}
    return [
        dict(zip(epochs.tolist(), (values / by[seed][1] if by else values).tolist(), strict=True))
        for seed, (epochs, values) in runs.items()
    ]
