"""The command line: `gradmask run`, `study`, `recipes`, `scores`, `report`, `audit`, ..."""

from __future__ import annotations

import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from functools import partial

from gradmask.cli.ending import end
from gradmask.cli.terminal import prepare_streams, show_warning


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
            from gradmask.cli.app import run_words  # cyclopts may be missing

            return run_words(words)
        finally:
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if arguments is None:  # the process ends: nothing is to interrupt that
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if debug:
            traceback.print_exc()
        return end(error, run=words[:1] in (["run"], ["study"]))
