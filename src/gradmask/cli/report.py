"""What the commands show: reports of runs, and lists of what there is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from gradmask.cli.terminal import terminal
from gradmask.cli.values import usable_path
from gradmask.errors import OptionError, StateError
from gradmask.interrupts import work_begins

if TYPE_CHECKING:
    from gradmask.study.statistics import Results


def report(*folders: Annotated[str, Parameter(required=True)], output: str | None = None) -> int:
    """Build the report of a run again, or that of several.

    Args:
        folders: Output folders of runs.
        output: The page that shows several (default: beside the first folder).
    """
    from gradmask.recipes.results import check_theorem
    from gradmask.recipes.theorem.run import FILE
    from gradmask.study.folder import read_results

    paths = [usable_path("folder", folder) for folder in folders]
    work_begins()
    if len(paths) > 1:
        return _show_several(paths, output)
    if output is not None:
        raise OptionError("--output is for the page of several folders: leave it out.")
    (directory,) = paths
    if (directory / FILE).is_file():
        return show_theorem(directory, read_results(directory, FILE, check_theorem))
    return show(directory, _read_finished(directory))


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


def show(directory: Path, results: Results) -> int:
    """Print the summary of a study, and write its report into its folder."""
    from gradmask.recipes.report import print_summary, write_report

    console = terminal()
    print_summary(results, console)
    if results["config"].get("train") == "gradmask.recipes.finetune.run:train":
        from gradmask.recipes.finetune.fronts import print_fronts, write_figure

        print_fronts(results, console)
        write_figure(directory, results)
    page = write_report(directory, results)
    console.print(f"Report: {page}", soft_wrap=True, highlight=False, markup=False)
    return 0


def show_theorem(directory: Path, results: Results) -> int:
    """The same of the recipe `theorem1`."""
    from gradmask.recipes.theorem.report import print_theorem, write_theorem

    console = terminal()
    print_theorem(results, console)
    write_theorem(directory, results)
    place = f"Tables and figure: {directory}"
    console.print(place, soft_wrap=True, highlight=False, markup=False)
    return 0


def recipes() -> int:
    """List the recipes."""
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


def scores() -> int:
    """List the scores that a mask can choose entries by."""
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


def cache(*, clear: Annotated[bool, Parameter(negative="")] = False) -> int:
    """List what is kept of decoded images.

    Args:
        clear: Remove it.
    """
    from gradmask.recipes.data.cache import show_cache

    show_cache(terminal(), clear)
    return 0
