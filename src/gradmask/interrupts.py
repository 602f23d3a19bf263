"""Interrupts while the command line still imports: one line and status 130, at any moment."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType

LINE = "gradmask: interrupted."


def end_at_once() -> None:
    """Let an interrupt end this process at once, if it is the command line and does not work yet.

    Imports are no place for an exception: some catch all, some print it. A user's own process is
    left as it is, and so is one that was started to ignore interrupts.
    """
    module = sys.argv[:1] == ["-m"] and {"gradmask", "gradmask.cli"} & {*sys.orig_argv[:6]}
    script = bool(sys.argv) and Path(sys.argv[0]).stem == "gradmask"
    if (module or script) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def work_begins() -> None:
    """From here on an interrupt is an exception: files are closed, what is unfinished removed."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    try:
        os.write(2, f"{LINE}\n".encode())
    finally:
        os._exit(128 + number)
