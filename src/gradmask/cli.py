"""The command line: `gradmask run`, `recipes`, `report`, `audit` and `bench`.

Options are typed once, in the dataclasses `Comparison` and `TheoremCheck`. jsonargparse was chosen
to read them because one parser then checks the command line and a YAML file alike, by the same
types.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmask import __version__
from gradmask.errors import GradmaskError, OptionError, check_choice

if TYPE_CHECKING:  # heavy imports wait until they are needed: `--version` answers at once
    from rich.console import Console

    from gradmask.experiments.config import Comparison
    from gradmask.experiments.statistics import Results
    from gradmask.experiments.theorem_config import TheoremCheck

COMMANDS = ("run", "recipes", "report", "audit", "bench")
_LISTS = ("arms", "models", "seeds", "monitor")


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
    _add_audit(commands)
    _add_bench(commands)
    # Argparse would take a leading option for its own.
    if words[:1] == ["run"]:
        return _run(words[1:])
    if words[:2] == ["bench", "refresh"]:
        return _bench_refresh(words[2:])
    parsed = parser.parse_args(words)
    if parsed.command == "recipes":
        return _recipes()
    if parsed.command == "bench":
        return _bench(parsed)
    if parsed.command == "audit":
        return _audit(parsed)
    return _report(parsed.directory)


def _run(words: list[str]) -> int:
    from gradmask.experiments.compare import run_comparison
    from gradmask.experiments.config import Comparison
    from gradmask.experiments.progress import Progress
    from gradmask.experiments.theorem import run_theorem

    config = _options(words)
    if not isinstance(config, Comparison):
        return _show_theorem(config.output, run_theorem(config, _console()))
    results = run_comparison(config, Progress(_console()))
    return _show(config.output, results)


def _report(directory: Path) -> int:
    from gradmask.experiments.compare import read_results
    from gradmask.experiments.theorem import FILE

    if (directory / FILE).is_file():
        return _show_theorem(directory, read_results(directory, FILE))
    return _show(directory, read_results(directory))


def _show(directory: Path, results: Results) -> int:
    from gradmask.experiments.report import print_summary, write_report

    console = _console()
    print_summary(results, console)
    page = write_report(directory, results)
    console.print(f"Report: {page}", soft_wrap=True, highlight=False)
    return 0


def _show_theorem(directory: Path, results: Results) -> int:
    from gradmask.experiments.theorem_report import print_theorem, write_theorem

    console = _console()
    print_theorem(results, console)
    write_theorem(directory, results)
    console.print(f"Tables and figure: {directory}", soft_wrap=True, highlight=False)
    return 0


def _console() -> Console:
    """The terminal; a file or pipe has no width of its own, so it gets room for every column."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 120))


def _recipes() -> int:
    from gradmask.experiments.recipes import RECIPES

    console = _console()
    for recipe in RECIPES:
        console.print(f"[bold]{recipe.name}[/bold]  {recipe.description}", highlight=False)
        options = "  ".join(f"{name}={value}" for name, value in recipe.options.items())
        if recipe.sizes:
            options += f"  --size {'|'.join(recipe.sizes)}"
        if options:
            console.print(f"    {options}", style="dim", highlight=False)
    console.print("Run one with: gradmask run NAME [--option value ...]", highlight=False)
    return 0


def _options(words: list[str]) -> Comparison | TheoremCheck:
    """The options of `gradmask run`: defaults, the recipe's, a YAML file's, the command line's."""
    from jsonargparse import ArgumentParser

    from gradmask.experiments.recipes import find_recipe

    class Parser(ArgumentParser):
        def format_help(self, *args: Any, **kwargs: Any) -> str:
            text = super().format_help(*args, **kwargs)
            return re.sub(r"--\w+", lambda option: option[0].replace("_", "-"), text)

    named = bool(words) and not words[0].startswith("-")
    recipe = find_recipe(words[0] if named else "compare")
    size, words = _size(words[named:])
    parser = Parser(
        prog=f"gradmask run {recipe.name}", description=recipe.description, exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    if recipe.sizes:
        parser.add_argument("--size", help=f"preset: {', '.join(recipe.sizes)}")
    parser.add_class_arguments(recipe.kind)
    names = [field.name for field in fields(recipe.kind)]
    defaults = recipe.config(size)
    parser.set_defaults({name: getattr(defaults, name) for name in names})
    normal = _normal_form(words, [*names, "config", "print_config", "help"])
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    files.add_argument("--config", action="append", default=[])
    try:
        for file in files.parse_known_args(normal)[0].config:
            _check_file(file, names)
        parsed = parser.parse_args(normal)
    except argparse.ArgumentError as error:
        raise OptionError(_plain(str(error))) from error
    return recipe.kind(**{name: getattr(parsed, name) for name in names})


def _size(words: list[str]) -> tuple[str | None, list[str]]:
    """Take `--size` out: the defaults of all other options depend on it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--size")
    try:
        found, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise OptionError("--size needs a value.") from error
    return found.size, rest


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
    from gradmask.experiments.audit import Audit, run_audit
    from gradmask.experiments.audit_files import write_audit_files
    from gradmask.experiments.audit_report import print_audit, write_audit_report

    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(parsed).items()
        if value is not None and name != "command"
    }
    console = _console()
    audited = run_audit(Audit(**options), console)
    write_audit_files(audited)
    page = write_audit_report(audited)
    print_audit(audited, console)
    console.print(f"Report: {page}", soft_wrap=True, highlight=False)
    return 0


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="measure speed, with other libraries beside it")
    kinds = bench.add_subparsers(dest="what", required=True, metavar="WHAT")
    for what, text in (
        ("fisher", "the Fisher diagonal, against a plain pass and other libraries"),
        ("layers", "the ways to a convolution's squares"),
        ("influence", "the influence of samples, against the gradients and passes it needs"),
        ("step", "a masked optimizer step"),
        ("threshold", "the exact threshold over all entries"),
    ):
        kind = kinds.add_parser(what, help=text)
        rounds = 3 if what == "influence" else 7
        kind.add_argument("--rounds", type=int, default=rounds, help="times everything is timed")
        kind.add_argument("--device", default="cpu")
        if what == "threshold":
            kind.add_argument("--entries", type=int, default=10**8)
            continue
        names = "resnet18, mlp, ..., a torchvision classifier, or package.module:function"
        kind.add_argument("--model", default="resnet18", help=names)
        kind.add_argument("--batch-size", type=int, help="samples in a batch")
        kind.add_argument("--shape", type=int, nargs="+", help="shape of one sample: 3 224 224")
        if what == "influence":
            for option, default, text in (
                ("--sources", 1000, "sources of the Gram matrix and the diagonal form"),
                ("--probe", 1000, "probe samples of the Gram matrix"),
                ("--step-sources", 20, "sources of the divergence and the exact quadratic form"),
                ("--step-probe", 200, "probe samples of these"),
                ("--memory", 1024, "MiB that gradients and activations may take, about"),
            ):
                kind.add_argument(option, type=int, default=default, help=text)
        if what == "fisher":
            kind.add_argument("--batches", type=int, default=8, help="batches in a pass")
            kind.add_argument("--no-peers", dest="peers", action="store_false")
    kinds.add_parser("refresh", help="how many samples a mask needs (options of `gradmask run`)")


def _bench(parsed: argparse.Namespace) -> int:
    from rich.console import Console

    from gradmask.benchmarks.fisher import bench_fisher
    from gradmask.benchmarks.influence import bench_influence
    from gradmask.benchmarks.layers import bench_layers
    from gradmask.benchmarks.mask import bench_step, bench_threshold

    benches: dict[str, Callable[..., Any]] = {
        "fisher": bench_fisher,
        "layers": bench_layers,
        "influence": bench_influence,
        "step": bench_step,
        "threshold": bench_threshold,
    }
    options = {k: v for k, v in vars(parsed).items() if k not in ("command", "what", "model")}
    model = [parsed.model] if "model" in parsed else []
    Console().print(benches[parsed.what](*model, **options))
    return 0


def _bench_refresh(words: list[str]) -> int:
    from gradmask.benchmarks.refresh import bench_refresh
    from gradmask.experiments.config import Comparison

    config = _options(words)
    if not isinstance(config, Comparison):
        raise OptionError("bench refresh trains one network: give no recipe, or a comparison's.")
    bench_refresh(config)
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


def _check_file(file: str, names: list[str]) -> None:
    """Refuse a YAML file in plain words; jsonargparse would speak of its parser."""
    import yaml

    try:
        options = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"config={file!r} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "it is not plain text in UTF-8"
        raise OptionError(f"config={file!r} is not valid YAML{where}: {reason}.") from error
    if not isinstance(options, dict):
        raise OptionError(f"config={file!r} holds no options: write lines such as 'keep: 0.25'.")
    for name in options:
        check_choice(f"{file} option", name, names)


def _plain(message: str) -> str:
    """Jsonargparse's message in the words of the other errors."""
    text = " ".join(line.strip() for line in message.splitlines() if line.strip())
    found = re.match(r'Parser key "(\w+)": .*?(?:<class \'(\w+)\'>|Literal\[(.*?)\]).*: (.*)', text)
    if not found:
        return text
    name, kind, choices, value = found.groups()
    if choices:
        check_choice(name, value, re.findall(r"'(\w+)'", choices))
    return f"{name}={value!r} is not of the type {kind}."


if __name__ == "__main__":
    sys.exit(main())
