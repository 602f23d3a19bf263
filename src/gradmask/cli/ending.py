"""How a command ends: here every exception becomes one line and a status."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

from gradmask.cli.terminal import has_reader, say, settle
from gradmask.errors import DistributedError, GradmaskError, TrialError
from gradmask.interrupts import LINE

FAILED, WRONG_USE, BROKEN_PIPE, INTERRUPTED = 1, 2, 141, 130
EXTRAS = "pip install 'gradmask[experiments]'"
_MENDS = {
    errno.ENOSPC: "make room and give the same command again, or choose another --output",
    errno.EDQUOT: "make room and give the same command again, or choose another --output",
    errno.EROFS: "choose another --output",
    errno.EACCES: "choose another --output, or change its permissions",
    errno.EPERM: "choose another --output, or change its permissions",
    errno.ENOTDIR: "a folder is needed where there is a file",
    errno.EISDIR: "a file is needed where there is a folder",
    errno.ENAMETOOLONG: "choose a shorter path",
}


def end(error: BaseException, run: bool = False) -> int:
    """Say in one line how a command ended.

    Args:
        error: What ended it.
        run: Whether it was `gradmask run`, which goes on from its last checkpoint.

    Returns:
        Exit status: 1 for work that failed, 2 for wrong use or a place that cannot be used, 130
        when interrupted, 141 when nobody reads the output.
    """
    nobody_reads = not has_reader(sys.stdout)
    reader_left = not settle(sys.stdout) or nobody_reads
    if isinstance(error, BrokenPipeError) and reader_left:
        settle(sys.stderr)
        return BROKEN_PIPE
    line, status = _ending(error)
    if status == INTERRUPTED and run:
        line += " A run has its last checkpoint: the same command goes on."
    say(line)
    return status


def _ending(error: BaseException) -> tuple[str, int]:
    prefix, text = "gradmask: error:", str(error)
    match error:
        case KeyboardInterrupt():
            return LINE, INTERRUPTED
        case DistributedError() | TrialError():
            return f"{prefix} {text}", FAILED
        case GradmaskError():
            return f"{prefix} {text}", WRONG_USE
        case ImportError():
            more = "" if "pip install" in text else f" Install what is missing: {EXTRAS}"
            return f"{prefix} {text.rstrip('.')}.{more}", WRONG_USE
        case subprocess.CalledProcessError():
            last = [line for line in _text(error.stderr).splitlines() if line.strip()][-1:]
            told = [line for line in last if line.startswith(prefix)]
            status = error.returncode if told and error.returncode > 0 else FAILED
            return (told or [f"{prefix} {text} {' '.join(last)}"])[0], status
        case BrokenPipeError() | ConnectionError() | EOFError():
            return f"{prefix} another process ended early ({text}): try again.", FAILED
        case OSError():
            reason = error.strerror or text
            where = f"{error.filename!r}: " if error.filename is not None else ""
            mend = _MENDS.get(error.errno or 0)
            return f"{prefix} {where}{reason}{f': {mend}' if mend else ''}.", WRONG_USE
    first = (text.strip().splitlines() or [""])[0]
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate" in text:
        reason = f"out of memory ({first or 'no details'}): use smaller sizes"
        return f"{prefix} {reason}, such as --batch-size or --width.", FAILED
    if "embedded null" in text or isinstance(error, UnicodeError):
        return f"{prefix} a name cannot be used as a path: {first}.", WRONG_USE
    kind = type(error).__name__
    return f"{prefix} {kind}: {first} (--debug shows where; please report it.)", FAILED


def _text(output: str | bytes | None) -> str:
    return os.fsdecode(output or b"")
