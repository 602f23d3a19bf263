"""The command line: `gradmask run`, `study`, `recipes`, `scores`, `report`, `audit`, ..."""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gradmask import __version__
from gradmask.cli.audit import add_audit, run_audit, run_clean
from gradmask.cli.bench import add_bench, bench_refresh, run_bench
from gradmask.cli.ending import end
from gradmask.cli.options import read_options, read_study
from gradmask.cli.parser import Parser, usable_path
from gradmask.cli.terminal import prepare_streams, show_warning, terminal
from gradmask.errors import OptionError, StateError, TrialError, check_choice
from gradmask.interrupts import work_begins

if TYPE_CHECKING:  # heavy imports wait until they are needed: `--version` answers at once
    from gradmask.study.statistics import Results

COMMANDS = ("run", "study", "recipes", "scores", "report", "audit", "cache", "bench")
_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows `gradmask` (default: the process's own).

    Returns:
        Exit status: 0, 1 when the work failed, 2 for wrong use or a place that cannot be used, 75
        when `--stop-after` left work to do (by convention: try again), 130 when interrupted, 141
        when nobody reads the output.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    prepare_streams()
    if arguments is None:
        warnings.showwarning = partial(show_warning, warnings.showwarning)
    try:
        try:
            return _main(words)
        finally:
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if arguments is None:  # the process ends: nothing is to interrupt that
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if debug:
            traceback.print_exc()
        return end(error, run=words[:1] in (["run"], ["study"]))


def _main(words: list[str]) -> int:
    if words and words[0].startswith("--"):
        check_choice("option", words[0], ("--help", "--version", "--debug"))
    elif words and words[0] != "-h":
        check_choice("command", words[0], COMMANDS)
    parser = Parser(
        prog="gradmask", description="Train with a gradient mask, with controls, and compare."
    )
    parser.add_argument("--version", action="version", version=f"gradmask {__version__}")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run a recipe: gradmask run demo", add_help=False)
    run.add_argument("options", nargs=argparse.REMAINDER)
    commands.add_parser("study", help="compare by a training function: gradmask study module:train")
    commands.add_parser("recipes", help="list the recipes")
    commands.add_parser("scores", help="list the scores that a mask can choose entries by")
    report = commands.add_parser("report", help="build the report of a run again, or of several")
    report.add_argument("folders", nargs="+", help="output folders of runs")
    report.add_argument("--output", help="the page that shows several (beside the first folder)")
    add_audit(commands)
    cache = commands.add_parser("cache", help="list what is kept of decoded images")
    cache.add_argument("--clear", action="store_true", help="remove it")
    add_bench(commands)
    # Argparse would take a leading option for its own.
    if words[:1] == ["run"]:
        return _run(words[1:])
    if words[:1] == ["study"]:
        return _study(words[1:])
    if words[:2] == ["audit", "clean"]:
        return run_clean(words[2:])
    if words[:2] == ["bench", "refresh"]:
        return bench_refresh(words[2:])
    parsed = parser.parse_args(words)
    if parsed.command == "recipes":
        return _recipes()
    if parsed.command == "scores":
        return _scores()
    if parsed.command == "cache":
        from gradmask.recipes.data.cache import show_cache

        show_cache(terminal(), parsed.clear)
        return 0
    if parsed.command == "bench":
        return run_bench(parsed)
    if parsed.command == "audit":
        return run_audit(parsed)
    return _report([usable_path("folder", f) for f in parsed.folders], parsed.output)


def _run(words: list[str]) -> int:
    config = read_options(words)  # before imports that take seconds
    from gradmask.recipes.compare import run_comparison
    from gradmask.recipes.config import Comparison
    from gradmask.recipes.theorem.config import TheoremCheck
    from gradmask.recipes.theorem.run import run_theorem
    from gradmask.recipes.training.components import resolve_device
    from gradmask.study.budget import EpochsSpent
    from gradmask.study.processes import joined
    from gradmask.study.progress import Progress

    work_begins()
    device = getattr(config, "device", "cpu")
    with joined(cuda=resolve_device(device).type == "cuda") as ours:
        try:
            if isinstance(config, Comparison):
                progress = Progress(terminal(quiet=not ours.main), config.epochs)
                results = run_comparison(config, progress)
                return _show(config.output, results) if ours.main else 0
            if ours.count > 1:
                raise OptionError("This recipe runs in one process: start it without torchrun.")
            if isinstance(config, TheoremCheck):
                return _show_theorem(config.output, run_theorem(config, terminal()))
            from gradmask.recipes.finetune.config import FineTuning
            from gradmask.recipes.finetune.run import run_finetuning
            from gradmask.recipes.unlearn.run import run_unlearning

            progress = Progress(terminal())
            if isinstance(config, FineTuning):
                return _show(config.output, run_finetuning(config, progress))
            return _show(config.output, run_unlearning(config, progress))
        except EpochsSpent as spent:
            if ours.main:
                print(f"gradmask: {spent}")
            return _TRY_AGAIN if ours.count == 1 else 0  # torchrun takes all others for failures


def _study(words: list[str]) -> int:
    config = read_study(words)
    from dataclasses import asdict

    from gradmask.study import compare
    from gradmask.study.folder import read_results
    from gradmask.study.processes import joined
    from gradmask.study.progress import Progress

    sys.path.insert(0, "")  # as `python -m` has it: the function may be in a file here
    work_begins()
    with joined(cuda=False) as ours:
        try:
            results = compare(**asdict(config), progress=Progress(terminal(quiet=not ours.main)))
        except TrialError:
            found = read_results(config.output) if ours.count == 1 else {}
            if found.get("runs"):
                _show(config.output, found)
            raise
        return _show(config.output, results) if ours.main else 0


def _report(folders: list[Path], output: str | None) -> int:
    from gradmask.recipes.results import check_theorem
    from gradmask.recipes.theorem.run import FILE
    from gradmask.study.folder import read_results

    work_begins()
    if len(folders) > 1:
        return _show_several(folders, output)
    if output is not None:
        raise OptionError("--output is for the page of several folders: leave it out.")
    (directory,) = folders
    if (directory / FILE).is_file():
        return _show_theorem(directory, read_results(directory, FILE, check_theorem))
    return _show(directory, _read_finished(directory))


def _read_finished(directory: Path) -> Results:
    from gradmask.recipes.results import check_comparison
    from gradmask.study.folder import read_results

    results = read_results(directory, check=check_comparison)
    if not results["runs"]:
        raise StateError(f"No run in {directory} is finished: give its command again.")
    return results


def _show_several(folders: list[Path], output: str | None) -> int:
    from gradmask.study.report import print_summary, write_comparison_report

    console = terminal()
    studies = {folder: _read_finished(folder) for folder in folders}
    target = None if output is None else usable_path("output", output)
    page = write_comparison_report(studies, target)
    for folder, results in studies.items():
        console.print(str(folder), style="bold", soft_wrap=True, highlight=False, markup=False)
        print_summary(results, console)
    console.print(f"Report: {page}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _show(directory: Path, results: Results) -> int:
    from gradmask.recipes.report import print_summary, write_report

    console = terminal()
    print_summary(results, console)
    if results["config"].get("train") == "gradmask.recipes.finetune.run:train":
        from gradmask.recipes.finetune.fronts import print_fronts

        print_fronts(results, console)
    page = write_report(directory, results)
    console.print(f"Report: {page}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _show_theorem(directory: Path, results: Results) -> int:
    from gradmask.recipes.theorem.report import print_theorem, write_theorem

    console = terminal()
    print_theorem(results, console)
    write_theorem(directory, results)
    place = f"Tables and figure: {directory}"
    console.print(place, soft_wrap=True, highlight=False, markup=False)
    return 0


def _recipes() -> int:
    from gradmask.recipes.catalogue import RECIPES

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


def _scores() -> int:
    from rich.text import Text

    from gradmask import SCORES

    console = terminal()
    for score in SCORES.values():
        console.print(Text.assemble((score.name, "bold"), f"  {score.formula}"))
        about = [f"published: {score.which}, per {score.per}", f"cost: {score.cost}", score.source]
        console.print(Text(f"    {'; '.join(filter(None, about))}", style="dim"))
    console.print(
        Text(
            "g: gradient of one sample; ḡ: its mean over samples; w: the weight. Cost: of each "
            "refresh, in passes (forward and backward) over the data it is measured on.\n"
            "Use: FisherMask(score=...), or in an arm: fisher:score=snip:which=lowest"
        )
    )
    return 0
