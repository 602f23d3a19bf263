"""Arguments of the commands, with errors like all others: one line, the nearest known name."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from gradmask.errors import OptionError, check_choice

_MOST = 2**40  # what no computer has


class Printing:
    """Prints help so that a full disk is an error, which argparse passes over."""

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file or sys.stderr)


class Parser(Printing, argparse.ArgumentParser):
    """An argument parser that raises `OptionError`, and takes no abbreviations for options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message as ours."""
        raise OptionError(f"{message.rstrip('.')}: see {self.prog} --help.")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse what is left over by the nearest name of this command."""
        found, rest = super().parse_known_args(args, namespace)
        for word in rest:
            if word.startswith("--"):
                options = [name for name in self._option_string_actions if name.startswith("--")]
                check_choice("option", word.partition("=")[0], options)
        if rest:
            self.error(f"{rest[0]!r} is not expected here")
        return found, rest


def _whole(text: str, least: int) -> int:
    with contextlib.suppress(ValueError):
        if least <= (value := int(text)) < _MOST:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from {least} to {_MOST}")


# Types of arguments.
count = partial(_whole, least=1)
count_or_none = partial(_whole, least=0)


def usable_path(option: str, text: str | os.PathLike[str]) -> Path:
    """A path of the user, with `~` for a home folder.

    Args:
        option: The option that it was given to.
        text: The path.

    Returns:
        The path.

    Raises:
        OptionError: If it is empty, has a NUL, is not UTF-8, or names nobody's home.
    """
    name = os.fspath(text)
    if not name or "\0" in name:
        raise OptionError(f"{option}={name!r} is no path: give the name of a file or folder.")
    if name != name.encode(errors="replace").decode():
        raise OptionError(f"{option}={name!r} is no name in UTF-8: rename it.")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise OptionError(f"{option}={name!r} names a home folder that is not known.") from error
