"""The command line: `gradmask run`, `gradmask recipes`, `gradmask report`.

Options are typed once, in the dataclass `Comparison`. jsonargparse was chosen to read them because
one parser then checks the command line and a YAML file alike, by the same types.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from gradmask import __version__
from gradmask.errors import GradmaskError, OptionError, check_choice

COMMANDS = ("run", "recipes", "report")
_LISTS = ("arms", "seeds")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows `gradmask` (default: the process's own).

    Returns:
        Exit status: 0, 2 for a mistake of the user, 130 when interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _main(words)
    except (GradmaskError, PermissionError) as error:
        print(f"gradmask: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\ngradmask: interrupted. Finished runs are kept: the same command goes on.",
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
    if words[:1] == ["run"]:  # argparse would take a leading option for its own
        return _run(words[1:])
    parsed = parser.parse_args(words)
    if parsed.command == "recipes":
        return _recipes()
    return _report(parsed.directory)


def _run(words: list[str]) -> int:
    # The heavy imports wait until they are needed: `gradmask --version` answers at once.
    from jsonargparse import ArgumentParser, Namespace
    from rich.console import Console

    from gradmask.experiments.config import Comparison
    from gradmask.experiments.recipes import find_recipe

    named = bool(words) and not words[0].startswith("-")
    recipe = find_recipe(words[0] if named else "compare")
    parser = ArgumentParser(
        prog=f"gradmask run {recipe.name}",
        description=f"{recipe.description}. Words of an option may be joined by - or _.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_class_arguments(Comparison)
    defaults = recipe.config()
    parser.set_defaults({f.name: getattr(defaults, f.name) for f in fields(Comparison)})
    known = [*(f.name for f in fields(Comparison)), "config", "print_config", "help"]
    try:
        parsed: Namespace = parser.parse_args(_normal_form(words[named:], known))
    except argparse.ArgumentError as error:
        raise OptionError(_plain(str(error))) from error
    options = {f.name: getattr(parsed, f.name) for f in fields(Comparison)}
    return _compare(Comparison(**options), Console())


def _compare(config: object, console: object) -> int:
    from rich.console import Console

    from gradmask.experiments.compare import run_comparison
    from gradmask.experiments.config import Comparison
    from gradmask.experiments.progress import Progress
    from gradmask.experiments.report import print_summary, write_report

    assert isinstance(config, Comparison)
    assert isinstance(console, Console)
    results = run_comparison(config, Progress(console))
    print_summary(results, console)
    page = write_report(config.output, results)
    console.print(f"Report: {page}", soft_wrap=True, highlight=False)
    return 0


def _recipes() -> int:
    from rich.console import Console

    from gradmask.experiments.recipes import RECIPES

    console = Console()
    for recipe in RECIPES:
        console.print(f"[bold]{recipe.name}[/bold]  {recipe.description}", highlight=False)
        options = "  ".join(f"{name}={value}" for name, value in recipe.options.items())
        if options:
            console.print(f"    {options}", style="dim", highlight=False)
    console.print("Run one with: gradmask run NAME [--option value ...]", highlight=False)
    return 0


def _report(directory: Path) -> int:
    from rich.console import Console

    from gradmask.experiments.compare import read_results
    from gradmask.experiments.report import print_summary, write_report

    results = read_results(directory)
    console = Console()
    print_summary(results, console)
    page = write_report(directory, results)
    console.print(f"Report: {page}", soft_wrap=True, highlight=False)
    return 0


def _normal_form(words: list[str], known: list[str]) -> list[str]:
    """Options as jsonargparse wants them: underscores, lists in brackets; unknown names refused."""
    normal: list[str] = []
    place = 0
    while place < len(words):
        word = words[place]
        place += 1
        if not word.startswith("--"):
            normal.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        check_choice("option", name, known)
        if name in _LISTS:
            items = [value] if equals else []
            while not equals and place < len(words) and not words[place].startswith("--"):
                items.append(words[place])
                place += 1
            text = ",".join(items)
            normal.append(f"--{name}={text if text.startswith('[') else f'[{text}]'}")
        else:
            normal.append(f"--{name}{equals}{value}")
    return normal


def _plain(message: str) -> str:
    """Jsonargparse's message in the words of the other errors."""
    text = " ".join(line.strip() for line in message.splitlines() if line.strip())
    found = re.match(r'Parser key "(\w+)": Expected a (.*)\. Got value: (.*)', text)
    if not found:
        return text
    name, kind, value = found.groups()
    if kind.startswith("typing.Literal"):
        check_choice(name, value, re.findall(r"'(\w+)'", kind))
    return f"{name}={value!r} is not of the type {kind.removeprefix('<class ').rstrip('>')}."


if __name__ == "__main__":
    sys.exit(main())
