"""`gradmask audit` and `gradmask audit clean`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Group, Parameter

from gradmask.cli.options import command, help_of, parameter, parameters_of
from gradmask.cli.terminal import terminal
from gradmask.errors import OptionError
from gradmask.extras import require
from gradmask.interrupts import work_begins
from gradmask.recipes.audit.options import Audit, Clean, DynamicsAudit

if TYPE_CHECKING:
    from rich.console import Console

Kind = Literal["dynamics", "influence"]
_KINDS = {"dynamics": DynamicsAudit, "influence": Audit}


def _audit(by: Kind = "dynamics", **given: Any) -> int:
    for name in given:
        if name not in _names(_KINDS[by]):
            other = next(kind for kind in _KINDS if name in _names(_KINDS[kind]))
            raise OptionError(f"--{name.replace('_', '-')} is an option of --by {other}.")
    require("experiments", "gradmask audit")
    console = terminal()
    work_begins()
    pages = _by_dynamics if by == "dynamics" else _by_influence
    for page in pages(given, console):
        console.print(f"Report: {page}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _names(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def _by_dynamics(options: dict[str, Any], console: Console) -> list[Path]:
    from gradmask.recipes.audit.dynamics import audit_dynamics
    from gradmask.recipes.audit.tables import print_detection, print_suspicious, write_audit

    found = DynamicsAudit(**options)
    config, runs = audit_dynamics(found)
    pages = write_audit(found, config, runs)
    print_suspicious(runs[0], console)
    print_detection(runs, console)
    return pages


def _by_influence(options: dict[str, Any], console: Console) -> list[Path]:
    from gradmask.recipes.audit.files import write_audit_files
    from gradmask.recipes.audit.report import print_audit, write_audit_report
    from gradmask.recipes.audit.run import run_audit

    audited = run_audit(Audit(**options), console)
    write_audit_files(audited)
    page = write_audit_report(audited)
    print_audit(audited, console)
    return [page]


def _clean(**given: Any) -> int:
    require("experiments", "gradmask audit clean")
    from gradmask.recipes.audit.clean import run_clean, sentences
    from gradmask.study import report
    from gradmask.study.progress import Progress

    options = Clean(**given)
    console = terminal()
    work_begins()
    results = run_clean(options, Progress(console))
    output = options.output or options.folder / "clean"
    found = sentences(results)
    report.print_summary(results, console, found)
    title = "Does it help to clean the labels?"
    page = report.write_report(output, results, title=title, conclusion=found)
    console.print(f"Report: {page}", soft_wrap=True, highlight=False, markup=False)
    return 0


_BOTH = Group("Audit", sort_key=1)
_INFLUENCE = Group("With --by influence, of runs with --save-every", sort_key=2)

audit = App(
    name="audit",
    help_epilogue="Examples:\n"
    "  gradmask audit runs/audited\n"
    "  gradmask audit runs/audited --by influence --epochs 2 6 12 --top 50\n"
    "  gradmask audit clean runs/audited\n"
    "  gradmask audit ./clean    (a folder that is called clean)",
)
audit.default(
    command(
        _audit,
        [
            *parameters_of(DynamicsAudit, group=_BOTH),
            parameter("by", Annotated[Kind, Parameter(group=_BOTH)], "dynamics"),
            *(
                found
                for found in parameters_of(Audit, group=_INFLUENCE)
                if found.name not in _names(DynamicsAudit)
            ),
        ],
        help_of(
            "Rank training samples by what is memorised.",
            *(Audit, DynamicsAudit),
            by="What training said of each sample, or influence at kept weights.",
        ),
    )
)
audit.command(
    command(
        _clean,
        parameters_of(Clean),
        help_of("Drop or relabel what an audit finds, train again, and compare.", Clean),
    ),
    name="clean",
    help_epilogue="Example:\n  gradmask audit clean runs/audited --jobs 2",
)
