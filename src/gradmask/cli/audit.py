"""`gradmask audit`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmask.cli.parser import Parser, count, count_or_none, usable_path
from gradmask.cli.terminal import terminal
from gradmask.errors import OptionError
from gradmask.interrupts import work_begins

if TYPE_CHECKING:
    from rich.console import Console

_SHARED = ("folder", "arm", "seeds", "top")
_ONLY = {
    "dynamics": ("false_alarms", "share"),
    "influence": ("epochs", "fisher", "probe", "score", "device", "threads"),
}


def add_audit(commands: Any) -> None:
    """Add the command's options to those of the others.

    Args:
        commands: Where argparse keeps the commands.
    """
    audit = commands.add_parser("audit", help="rank training samples by what is memorised")
    audit.add_argument("folder", help="output folder of gradmask run")
    audit.add_argument("--arm", help="kind of mask of the runs (none)")
    audit.add_argument("--seeds", type=count_or_none, nargs="+", help="seeds to audit (all)")
    audit.add_argument("--top", type=count_or_none, help="samples that are shown (200, or 100)")
    audit.add_argument(
        "--by",
        choices=tuple(_ONLY),
        default="dynamics",
        help="what training said of each sample, or influence at kept weights (dynamics)",
    )
    audit.add_argument(
        "--false-alarms", type=float, help="share of right labels among the flagged (0.1)"
    )
    audit.add_argument("--share", type=float, help="share of the samples to flag, instead")
    influence = audit.add_argument_group("with --by influence, of runs with --save-every")
    influence.add_argument("--epochs", type=count, nargs="+", help="epochs to score at (all kept)")
    influence.add_argument("--fisher", help="empirical, sampled or exact (empirical)")
    influence.add_argument("--probe", type=count, help="samples to measure influence on (200)")
    influence.add_argument("--score", help="what ranks the samples: loss, influence, ... (loss)")
    influence.add_argument("--device", help="auto, cpu, cuda, ... (auto)")
    influence.add_argument("--threads", type=count, help="CPU threads (PyTorch's choice)")


def run_clean(words: list[str]) -> int:
    """Run `gradmask audit clean FOLDER`.

    Args:
        words: What follows `clean`.

    Returns:
        Exit status.
    """
    parser = Parser(
        prog="gradmask audit clean",
        description="Drop or relabel what an audit finds, train again, and compare. (A folder that "
        "is called clean: gradmask audit ./clean)",
    )
    parser.add_argument("folder", help="output folder of gradmask run, with runs of arm none")
    parser.add_argument("--share", type=float, help="share to drop (as many as are estimated)")
    parser.add_argument("--seeds", type=count_or_none, nargs="+", help="seeds of the runs (all)")
    parser.add_argument("--jobs", type=count, help="runs at a time (1)")
    parser.add_argument("--threads", type=count, help="CPU threads of each (an equal share)")
    parser.add_argument("--output", help="where the new runs are kept (clean in the folder)")
    options = _given(parser.parse_args(words))
    for name in ("folder", "output"):
        if name in options:
            options[name] = usable_path(name, options[name])
    from gradmask.recipes.audit.clean import Clean, sentences
    from gradmask.recipes.audit.clean import run_clean as train_again
    from gradmask.study import report
    from gradmask.study.progress import Progress

    console = terminal()
    work_begins()
    results = train_again(Clean(**options), Progress(console))
    output = options.get("output", options["folder"] / "clean")
    found = sentences(results)
    report.print_summary(results, console, found)
    title = "Does it help to clean the labels?"
    page = report.write_report(output, results, title=title, conclusion=found)
    console.print(f"Report: {page}", soft_wrap=True, highlight=False, markup=False)
    return 0


def run_audit(parsed: argparse.Namespace) -> int:
    """Run the command.

    Args:
        parsed: What argparse read.

    Returns:
        Exit status.

    Raises:
        OptionError: If an option is one of the other kind of audit.
    """
    options = _given(parsed)
    for name in options:
        if name not in (*_SHARED, *_ONLY[parsed.by]):
            other = next(kind for kind in _ONLY if name in _ONLY[kind])
            raise OptionError(f"--{name.replace('_', '-')} is an option of --by {other}.")
    options["folder"] = usable_path("folder", options["folder"])
    console = terminal()
    work_begins()
    audit = _by_dynamics if parsed.by == "dynamics" else _by_influence
    for page in audit(options, console):
        console.print(f"Report: {page}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _given(parsed: argparse.Namespace) -> dict[str, Any]:
    """The options of an audit that were given."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(parsed).items()
        if value is not None and name not in ("command", "debug", "by")
    }


def _by_dynamics(options: dict[str, Any], console: Console) -> list[Path]:
    from gradmask.recipes.audit.dynamics import DynamicsAudit, audit_dynamics
    from gradmask.recipes.audit.tables import print_detection, write_audit

    audit = DynamicsAudit(**options)
    config, runs = audit_dynamics(audit)
    pages = write_audit(audit, config, runs)
    print_detection(runs, console)
    return pages


def _by_influence(options: dict[str, Any], console: Console) -> list[Path]:
    from gradmask.recipes.audit.files import write_audit_files
    from gradmask.recipes.audit.report import print_audit, write_audit_report
    from gradmask.recipes.audit.run import Audit, run_audit

    audited = run_audit(Audit(**options), console)
    write_audit_files(audited)
    page = write_audit_report(audited)
    print_audit(audited, console)
    return [page]
