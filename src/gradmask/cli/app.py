"""All commands, each of which is imported when it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import (
    App,
    CycloptsError,
    Group,
    Parameter,
    UnknownOptionError,
    UnusedCliTokensError,
)

from gradmask import __version__
from gradmask.cli.values import read_path
from gradmask.errors import OptionError, check_choice

_ABOUT = Group("About", sort_key=9)
# Where the first word is a name, and of what.
_NAMED = {
    (): "command",
    ("run",): "recipe",
    ("bench",): "benchmark",
    ("bench", "refresh"): "recipe",
}

app = App(
    name="gradmask",
    help="Train with a gradient mask, with controls, and compare.",
    help_epilogue="Examples:\n  gradmask run demo --output runs/demo\n"
    "  gradmask study package.module:train --arms none fisher slow --seeds 0 1 2\n"
    "  gradmask audit runs/demo\n\n--debug, anywhere, shows where an error comes from.",
    help_format="plaintext",
    version_flags=[],
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
app["--help"].group = _ABOUT
_STUDY = "gradmask study package.module:train"
for place, text, examples in (
    ("run:run", "Run a recipe: train with each kind of mask, and compare.", ""),
    (
        "run:study",
        "Compare arms by a training function of your own.",
        f"{_STUDY} --arms none fisher slow --seeds 0 1 2\n  {_STUDY} --sweep lr=0.01,0.1 --jobs 2",
    ),
    ("report:recipes", "List the recipes.", "gradmask recipes"),
    ("report:scores", "List the scores that a mask can choose entries by.", "gradmask scores"),
    (
        "report:report",
        "Build the report of a run again, or that of several.",
        "gradmask report runs/demo\n  gradmask report runs/one runs/other --output both.html",
    ),
    ("audit:audit", "Rank training samples by what is memorised.", ""),
    ("report:cache", "List what is kept of decoded images.", "gradmask cache --clear"),
    ("bench:bench", "Measure speed, with other libraries beside it.", ""),
):
    about = {"help_epilogue": f"Examples:\n  {examples}"} if examples else {}
    app.command(f"gradmask.cli.{place}", name=place.rpartition(":")[2], help=text, **about)


@app.default
def _nothing() -> None:
    raise OptionError("A COMMAND is missing: see gradmask --help.")


@app.command(name="--version", group=_ABOUT, help_flags=[], help="Show the version.")
def _version() -> None:
    print(f"gradmask {__version__}")  # that of cyclopts would import rich for it


@app.command(name="--install-completion", group=_ABOUT)
def install_completion(
    *,
    shell: Literal["bash", "zsh", "fish", "powershell"] | None = None,
    output: Annotated[Path | None, Parameter(converter=read_path)] = None,
) -> None:
    """Let the shell complete commands and options.

    Args:
        shell: Which shell (default: the one that this is started from).
        output: File for its script, to be loaded by yourself (default: where the shell looks).
    """
    from cyclopts.completion.detect import ShellDetectionError

    try:
        written = app.install_completion(shell=shell, output=output, add_to_startup=output is None)
    except ShellDetectionError as error:
        raise OptionError("The shell is not known: name it with --shell.") from error
    print(f"Completion: {written} (for new shells)")


def run_words(words: Sequence[str]) -> int:
    """Run the command that the words after `gradmask` name, and return its exit status.

    Raises:
        OptionError: If the words are wrong, in one line that names the nearest right one.
    """
    try:
        return int(app(words) or 0)
    except CycloptsError as error:
        raise OptionError(_line(error)) from error


def _line(error: CycloptsError) -> str:
    """An error of cyclopts in one line; a wrong name comes before all that follows it."""
    chain = tuple(error.command_chain or ())
    rest = (error.root_input_tokens or [])[len(chain) :]
    if chain in _NAMED and error.app and rest and not rest[0].startswith("-"):
        known = [name for name in error.app.resolved_commands() if not name.startswith("-")]
        check_choice(_NAMED[chain], rest[0], known)
    if isinstance(error, UnknownOptionError) and not chain:
        names = [name for name in app if name.startswith("--")]
        check_choice("option", rest[0], [*names, "--debug"])
    if isinstance(error, UnusedCliTokensError):
        word = (error.unused_tokens or [""])[0]
        switch = " (a switch is --name or --no-name)" if word in ("true", "false") else ""
        command = " ".join(["gradmask", *chain])
        return f"{word!r} is not expected here{switch}: see {command} --help."
    if isinstance(error.__cause__, OptionError):  # of one of the readers of values
        return str(error.__cause__)
    error.verbose = False
    return " ".join(str(error).split())
