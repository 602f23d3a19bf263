"""Where the commands print."""

from __future__ import annotations

import codecs
import contextlib
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from gradmask.errors import GradmaskWarning

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN = {
    "±": "+-",
    "÷": "/",
    "\u00d7": "x",
    "\u2013": "-",
    "…": "...",
    "²": "^2",
    "ε": "e",
    "ḡ": "mean(g)",
}


def terminal(quiet: bool = False) -> Console:
    """The terminal; a file or pipe has no width of its own, so it gets room for every column."""
    from rich.console import Console

    console = Console(quiet=quiet)
    wide = max(console.width, 120)
    return console if console.is_terminal else Console(width=wide, quiet=quiet)


def prepare_streams() -> None:
    """Make closed streams go nowhere, and write what an encoding does not have in plain letters."""
    codecs.register_error("plain", _plain)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        with contextlib.suppress(AttributeError, OSError):
            getattr(sys, name).reconfigure(errors="plain")


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeEncodeError):
        letter = error.object[error.start]
        if letter in _PLAIN:
            return _PLAIN[letter], error.start + 1
    return codecs.backslashreplace_errors(error)


def say(text: str) -> None:
    """Print one line on stderr, whatever is in it and wherever that goes."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)
    settle(sys.stderr)


def show_warning(
    others: Callable[..., None],
    message: Warning | str,
    category: type[Warning],
    *where: Any,
    **place: Any,
) -> None:
    """Show a warning of ours as one line, without the line of code that it came from.

    Args:
        others: Shows all other warnings.
        message: The warning.
        category: Its kind.
        where: File and line.
        place: Where to write, and the line's text.
    """
    if issubclass(category, GradmaskWarning):
        say(f"Warning: {message}")
    else:
        others(message, category, *where, **place)


def settle(stream: TextIO | Any) -> bool:
    """Write what waits to be written; if that fails, let all else go nowhere.

    Returns:
        Whether it could be written.
    """
    try:
        stream.flush()
        return True
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        return False


def has_reader(stream: TextIO | Any) -> bool:
    """Whether anybody may still read a stream: one without a buffer tells it in no other way."""
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)  # errors are told in any case
        return not any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # no file behind it
        return True
