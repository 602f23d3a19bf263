"""The report of a study, and of several side by side: pages and their files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from gradmask.errors import OptionError
from gradmask.study.arms import read_arm
from gradmask.study.files import write_atomically
from gradmask.study.folder import check_ours
from gradmask.study.metrics import metrics_of
from gradmask.study.report.figures import curves, differences, kept
from gradmask.study.report.fronts import front, values_table
from gradmask.study.report.parts import Figure, Look, Page, Section, looks
from gradmask.study.report.rendering import render, to_files
from gradmask.study.report.tables import answers_tables, differences_table, means_table, to_csv
from gradmask.study.results import without_diverged
from gradmask.study.statistics import Results, arms
from gradmask.study.verdicts import conclusions, correction, remarks, unasked

_GENERATOR = b'<meta name="generator" content="gradmask">'


def write_report(
    folder: Path,
    results: Results,
    *,
    title: str | None = None,
    subtitle: str | None = None,
    conclusion: Sequence[str] = (),
    notes: Sequence[str] = (),
    sections: Sequence[Section] = (),
    judged: bool = True,
) -> Path:
    """Write `report.html`, the figures as SVG and PNG files, and the numbers as CSV files.

    Args:
        folder: The study's output folder.
        results: Contents of its `results.json`.
        title: Heading of the page.
        subtitle: What was trained (default: the training function, arms, seeds).
        conclusion: What it shows (default: on each arm that is no control, what it is better than).
        notes: What the metrics are, below their table.
        sections: More sections, with figures of their own.
        judged: Whether the arms are compared: not if their runs have not learnt.

    Returns:
        Path of the page.

    Raises:
        OptionError: If the folder holds something else.
    """
    check_ours(folder)
    found = looks(arms(results))
    files = {f"{name}.csv": table for name, table in to_csv(results).items()}
    page = Page(
        title or _title(results),
        subtitle or _subtitle(results),
        [*(conclusion or conclusions(results)), *remarks(results)],
        [*_sections(results, found, notes, judged), *sections],
        found,
        files,
        {"Options": _to_yaml(results["config"]), "Environment": _environment(results)},
    )
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for figure in (figure for section in page.sections for figure in section.figures):
        for kind, contents in to_files(figure, found).items():
            write_atomically(folder / "figures" / f"{figure.name}.{kind}", contents)
    for name, contents in files.items():
        write_atomically(folder / name, contents)
    path = folder / "report.html"
    write_atomically(path, render(page))
    return path


def write_comparison_report(studies: Mapping[Path, Results], output: Path | None = None) -> Path:
    """Write one page on several studies, side by side.

    Args:
        studies: Contents of `results.json` by folder.
        output: The page (default: `report-with-OTHERS.html` in the first folder).

    Returns:
        Path of the page.

    Raises:
        OptionError: If the place holds something else.
    """
    first, *others = studies
    if not others:
        raise OptionError("Several studies side by side: give two different folders or more.")
    if output is None:
        check_ours(first)
        names = "-and-".join(re.sub(r"[^\w.=-]+", "_", p.resolve().name) for p in others)
        output = first / f"report-with-{names[:120]}.html"
    elif output.suffix != ".html":
        raise OptionError(f"output={str(output)!r} must be the name of a page, such as both.html.")
    elif output.exists() and not _is_ours(output):
        raise OptionError(f"{output} is no report of ours: choose another --output.")
    named = dict(zip(_names(list(studies)), studies.values(), strict=True))
    found = looks(dict.fromkeys(arm for results in named.values() for arm in arms(results)))
    table = means_table(named, found)
    note = "Mean ± standard deviation over seeds; bold: the best mean of each study."
    figure = curves(named, found)
    sections = [
        Section("Results", tables=[table], notes=[note]),
        *([Section("Training", figures=[figure], notes=[_BANDS])] if figure else []),
        *(
            Section(
                name,
                text=[
                    _subtitle(results),
                    *conclusions(results),
                    *remarks(results),
                ],
            )
            for name, results in named.items()
        ),
    ]
    csv = {f"{name}-{kind}.csv": t for name, r in named.items() for kind, t in to_csv(r).items()}
    options = {f"Options of {name}": _to_yaml(r["config"]) for name, r in named.items()}
    subtitle = "Arms are judged within each study only: others may have other data and seeds."
    page = Page(" and ".join(named), subtitle, [], sections, found, csv, options)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, render(page))
    return output


def _is_ours(page: Path) -> bool:
    with page.open("rb") as file:
        return _GENERATOR in file.read(1000)


def _names(folders: Sequence[Path]) -> list[str]:
    """Names of folders, or their whole paths where names are alike."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


_BANDS = (
    "Lines: mean over the seeds that have the epoch; bands: one standard deviation. Peaks of a "
    "loss in the first fifth of training may be cut off. Point at a line for its values; choose "
    "above which arms are shown."
)


def _sections(
    results: Results, looks: Sequence[Look], notes: Sequence[str], judged: bool
) -> list[Section]:
    whole = without_diverged(results)
    found = [_answers(results, looks) if judged else None]
    table = means_table({"": results}, looks)
    note = "Mean ± standard deviation over seeds; bold: the best mean."
    if any(metric.at == "best" for metric in metrics_of(results).shown):
        note += " The best epoch is chosen by the metric itself, and therefore too good."
    found.append(Section("Results", tables=[table], notes=[note, *notes]))
    difference, against = differences(whole, looks), differences_table(whole, looks)
    if difference is not None:
        text = (
            "A dot for each seed, a diamond for their mean, a line for its 95 % interval (Student's"
            " t over paired seeds, not corrected for the number of comparisons)."
        )
        folded = ("Every metric", [against]) if against is not None else None
        section = Section("Against no mask", figures=[difference], notes=[text], folded=folded)
        found.append(section)
    if (drawn := front(whole, looks)) is not None:
        found.append(_sweep(results, drawn, looks))
    if (drawn := curves({"": whole}, looks)) is not None:
        found.append(Section("Training", figures=[drawn], notes=[_BANDS]))
    if (drawn := kept(whole, looks)) is not None:
        text = "Mean over seeds; number of entries in brackets. Before the first refresh all learn."
        found.append(Section("What the mask keeps", figures=[drawn], notes=[text]))
    return [section for section in found if section is not None]


def _answers(results: Results, looks: Sequence[Look]) -> Section | None:
    tables = answers_tables(results, looks)
    notes = [correction(results)]
    if missing := unasked(results):
        notes.append(f"Controls were not run that would answer: {', '.join(missing)}")
    return Section("Is it better?", tables=tables, notes=notes) if tables else None


def _sweep(results: Results, figure: Figure, looks: Sequence[Look]) -> Section:
    validation = metrics_of(results).validation
    if validation is None:
        how = "No metric of validation was reported, so the first value stands for every arm."
    else:
        how = (
            f"Everywhere else on this page an arm stands at the value that {validation.title} "
            "chooses: for each seed by the mean of the other seeds, so that no seed is judged at a "
            "value which it has chosen itself."
        )
    note = "Mean over seeds with one standard deviation; diamonds: values that a seed chose."
    table = values_table(results, looks)
    return Section("Over the sweep", text=[how], tables=[table], figures=[figure], notes=[note])


def _title(results: Results) -> str:
    masks = any(read_arm(arm).strategy in ("fisher", "fixed") for arm in arms(results))
    return "Does the gradient mask help?" if masks else "Comparison of arms"


def _subtitle(results: Results) -> str:
    config = results["config"]
    seeds = ", ".join(str(seed) for seed in config["seeds"])
    parts = [str(config.get("train") or config.get("data") or "Study")]
    parts.append(f"{len(results['runs'])} runs of {len(arms(results))} arms, seeds {seeds}")
    sweep = config.get("sweep") or {}
    parts += [f"{name} {', '.join(map(str, values))}" for name, values in sweep.items()]
    chooser = metrics_of(results).chooser
    parts += [f"the epoch chosen by {chooser[0][0]}"] if chooser else []
    return "; ".join(parts) + "."


def _to_yaml(config: Mapping[str, object]) -> str:
    text: str = yaml.safe_dump(dict(config), sort_keys=False, default_flow_style=None)
    return text


def _environment(results: Results) -> str:
    minutes = sum(run["seconds"] for run in results["runs"]) / 60
    lines = [f"{name}: {value}" for name, value in results.get("environment", {}).items()]
    lines.append(f"training time: {minutes:.1f} minutes in {len(results['runs'])} runs")
    return "\n".join(lines)
