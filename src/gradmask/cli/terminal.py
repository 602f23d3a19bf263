"""Where the commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def terminal(quiet: bool = False) -> Console:
    """The terminal; a file or pipe has no width of its own, so it gets room for every column."""
    from rich.console import Console

    console = Console(quiet=quiet)
    wide = max(console.width, 120)
    return console if console.is_terminal else Console(width=wide, quiet=quiet)
