"""The command line: `gradmask run`, `recipes`, `report`, `audit` and `bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmask import __version__
from gradmask.cli.bench import add_bench, bench_refresh, run_bench
from gradmask.cli.options import read_options
from gradmask.cli.terminal import terminal
from gradmask.errors import GradmaskError, OptionError, check_choice

if TYPE_CHECKING:  # heavy imports wait until they are needed: `--version` answers at once
    from gradmask.experiments.reports.statistics import Results

COMMANDS = ("run", "recipes", "report", "audit", "bench")
_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows `gradmask` (default: the process's own).

    Returns:
        Exit status: 0, 2 for a mistake of the user, 75 when `--stop-after` left work to do (by
        convention: try again), 130 when interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _main(words)
    except (GradmaskError, PermissionError) as error:
        print(f"gradmask: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\ngradmask: interrupted. A run has its last checkpoint: the same command goes on.",
            file=sys.stderr,
        )
        return 130


def _main(words: list[str]) -> int:
    if words and not words[0].startswith("-"):
        check_choice("command", words[0], COMMANDS)
    parser = argparse.ArgumentParser(
        prog="gradmask", description="Train with a gradient mask, with controls, and compare."
    )
    parser.add_argument("--version", action="version", version=f"gradmask {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run a recipe: gradmask run demo", add_help=False)
    run.add_argument("options", nargs=argparse.REMAINDER)
    commands.add_parser("recipes", help="list the recipes")
    report = commands.add_parser("report", help="build the report of a run again")
    report.add_argument("directory", type=Path, help="output folder of a run")
    _add_audit(commands)
    add_bench(commands)
    # Argparse would take a leading option for its own.
    if words[:1] == ["run"]:
        return _run(words[1:])
    if words[:2] == ["bench", "refresh"]:
        return bench_refresh(words[2:])
    parsed = parser.parse_args(words)
    if parsed.command == "recipes":
        return _recipes()
    if parsed.command == "bench":
        return run_bench(parsed)
    if parsed.command == "audit":
        return _audit(parsed)
    return _report(parsed.directory)


def _run(words: list[str]) -> int:
    from gradmask.experiments.compare import run_comparison
    from gradmask.experiments.config import Comparison
    from gradmask.experiments.processes import joined
    from gradmask.experiments.progress import Progress
    from gradmask.experiments.theorem.run import run_theorem
    from gradmask.experiments.training.budget import EpochsSpent
    from gradmask.experiments.training.components import resolve_device

    config = read_options(words)
    with joined(cuda=resolve_device(config.device).type == "cuda") as ours:
        try:
            if isinstance(config, Comparison):
                results = run_comparison(config, Progress(terminal(quiet=not ours.main)))
                return _show(config.output, results) if ours.main else 0
            if ours.count > 1:
                raise OptionError("This recipe runs in one process: start it without torchrun.")
            return _show_theorem(config.output, run_theorem(config, terminal()))
        except EpochsSpent as spent:
            if ours.main:
                print(f"gradmask: {spent}")
            return _TRY_AGAIN if ours.count == 1 else 0  # torchrun takes all others for failures


def _report(directory: Path) -> int:
    from gradmask.experiments.folder import read_results
    from gradmask.experiments.theorem.run import FILE

    if (directory / FILE).is_file():
        return _show_theorem(directory, read_results(directory, FILE))
    return _show(directory, read_results(directory))


def _show(directory: Path, results: Results) -> int:
    from gradmask.experiments.reports.comparison import print_summary, write_report

    console = terminal()
    print_summary(results, console)
    page = write_report(directory, results)
    console.print(f"Report: {page}", soft_wrap=True, highlight=False)
    return 0


def _show_theorem(directory: Path, results: Results) -> int:
    from gradmask.experiments.theorem.report import print_theorem, write_theorem

    console = terminal()
    print_theorem(results, console)
    write_theorem(directory, results)
    console.print(f"Tables and figure: {directory}", soft_wrap=True, highlight=False)
    return 0


def _recipes() -> int:
    from gradmask.experiments.recipes import RECIPES

    console = terminal()
    for recipe in RECIPES:
        console.print(f"[bold]{recipe.name}[/bold]  {recipe.description}", highlight=False)
        options = "  ".join(f"{name}={value}" for name, value in recipe.options.items())
        if recipe.sizes:
            options += f"  --size {'|'.join(recipe.sizes)}"
        if options:
            console.print(f"    {options}", style="dim", highlight=False)
    console.print("Run one with: gradmask run NAME [--option value ...]", highlight=False)
    return 0


def _add_audit(commands: Any) -> None:
    audit = commands.add_parser("audit", help="rank training samples by what is memorised")
    audit.add_argument("folder", type=Path, help="output folder of a run with --save-every")
    audit.add_argument("--arm", help="kind of mask of the runs (none)")
    audit.add_argument("--seeds", type=int, nargs="+", help="seeds to audit (all)")
    audit.add_argument("--epochs", type=int, nargs="+", help="epochs to score at (all kept)")
    audit.add_argument("--fisher", help="empirical, sampled or exact (empirical)")
    audit.add_argument("--probe", type=int, help="training samples to measure influence on (200)")
    audit.add_argument("--score", help="what ranks the samples: loss, influence, ... (loss)")
    audit.add_argument("--top", type=int, help="images on the contact sheet (100)")
    audit.add_argument("--device", help="auto, cpu, cuda, ... (auto)")
    audit.add_argument("--threads", type=int, help="CPU threads (PyTorch's choice)")


def _audit(parsed: argparse.Namespace) -> int:
    from gradmask.experiments.audit.files import write_audit_files
    from gradmask.experiments.audit.report import print_audit, write_audit_report
    from gradmask.experiments.audit.run import Audit, run_audit

    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(parsed).items()
        if value is not None and name != "command"
    }
    console = terminal()
    audited = run_audit(Audit(**options), console)
    write_audit_files(audited)
    page = write_audit_report(audited)
    print_audit(audited, console)
    console.print(f"Report: {page}", soft_wrap=True, highlight=False)
    return 0
