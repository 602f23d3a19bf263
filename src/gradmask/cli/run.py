"""`gradmask run` and `gradmask study`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cyclopts import App, Group

from gradmask.cli.files import read_file
from gradmask.cli.options import (
    FILE_HELP,
    command,
    file_options,
    help_of,
    parameters_of,
    size_option,
)
from gradmask.cli.report import show, show_theorem
from gradmask.cli.terminal import terminal
from gradmask.errors import OptionError, TrialError
from gradmask.extras import require
from gradmask.interrupts import work_begins
from gradmask.recipes.catalogue import RECIPES, Options, Recipe
from gradmask.study.config import StudyOptions

_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


def recipes_app(name: str, run: Callable[[Options], int], about: str) -> App:
    """A command for each recipe under `name`, by default `compare`; `run` gets its options."""
    app = App(name=name.split()[-1], help=about, help_epilogue=_examples(name, "demo"))
    app.group_commands = Group("Recipes, each with --help of its own", sort_key=-1)
    for recipe in RECIPES:
        function = _command(recipe, run)
        app.command(function, name=recipe.name, help_epilogue=_examples(name, recipe.name))
        if recipe.name == "compare":
            app.default(function)
    return app


def _examples(name: str, recipe: str) -> str:
    command = f"gradmask {name} {recipe}"
    return (
        f"Examples:\n  {command} --seeds 0 1 2 --output runs/mine\n"
        f"  {command} --config runs/mine/config.yaml --output runs/again"
    )


def _command(recipe: Recipe, run: Callable[[Options], int]) -> Callable[..., int]:
    def called(
        size: str | None = None,
        config: Path | None = None,
        print_config: bool = False,
        **given: Any,
    ) -> int:
        options = recipe.config(size, **(read_file(recipe.kind, config) | given))
        return _print_config(options) if print_config else run(options)

    sizes = tuple(recipe.sizes)
    size = f"Preset of options; the defaults shown here are those of {sizes[0] if sizes else ''}."
    return command(
        called,
        [*parameters_of(recipe.kind, recipe.defaults()), *file_options(), size_option(sizes)],
        help_of(recipe.description, recipe.kind, size=size, **FILE_HELP),
    )


def _print_config(options: Options | StudyOptions) -> int:
    from gradmask.study.options import to_yaml

    print(to_yaml(options), end="")
    return 0


def run_recipe(config: Options) -> int:
    """Run a recipe, and show its results."""
    require("experiments", "gradmask run")
    from gradmask.recipes.compare import run_comparison
    from gradmask.recipes.config import Comparison
    from gradmask.recipes.theorem.config import TheoremCheck
    from gradmask.recipes.theorem.run import run_theorem
    from gradmask.recipes.training.components import resolve_device
    from gradmask.study.budget import EpochsSpent
    from gradmask.study.progress import Progress
    from gradmask.study.world import process_group

    work_begins()
    device = getattr(config, "device", "cpu")
    with process_group(cuda=resolve_device(device).type == "cuda") as world:
        try:
            if isinstance(config, Comparison):
                progress = Progress(terminal(quiet=not world.is_main), config.epochs)
                results = run_comparison(config, progress)
                return show(config.output, results) if world.is_main else 0
            if world.size > 1:
                raise OptionError("This recipe runs in one process: start it without torchrun.")
            if isinstance(config, TheoremCheck):
                return show_theorem(config.output, run_theorem(config, terminal()))
            from gradmask.recipes.finetune.config import FineTuning
            from gradmask.recipes.finetune.run import run_finetuning
            from gradmask.recipes.unlearn.run import run_unlearning

            progress = Progress(terminal())
            if isinstance(config, FineTuning):
                return show(config.output, run_finetuning(config, progress))
            return show(config.output, run_unlearning(config, progress))
        except EpochsSpent as spent:
            if world.is_main:
                print(f"gradmask: {spent}")
            return _TRY_AGAIN if world.size == 1 else 0  # torchrun takes all others for failures


def _study(config: Path | None = None, print_config: bool = False, **given: Any) -> int:
    options = StudyOptions(**(read_file(StudyOptions, config) | given))
    if print_config:
        return _print_config(options)
    if not options.train:
        raise OptionError("gradmask study needs a training function: package.module:function.")
    return run_study(options)


def run_study(options: StudyOptions) -> int:
    """Run a study of a training function, and show its results."""
    from dataclasses import asdict

    from gradmask.study import compare
    from gradmask.study.folder import read_results
    from gradmask.study.progress import Progress
    from gradmask.study.world import process_group

    sys.path.insert(0, "")  # as `python -m` has it: the function may be in a file here
    work_begins()
    with process_group(cuda=False) as world:
        try:
            results = compare(
                **asdict(options), progress=Progress(terminal(quiet=not world.is_main))
            )
        except TrialError:
            found = read_results(options.output) if world.size == 1 else {}
            if found.get("runs"):
                show(options.output, found)
            raise
        return show(options.output, results) if world.is_main else 0


run = recipes_app("run", run_recipe, "Run a recipe: train with each kind of mask, and compare.")
study = command(
    _study,
    [*parameters_of(StudyOptions), *file_options()],
    help_of("Compare arms by a training function.", StudyOptions, **FILE_HELP),
)
