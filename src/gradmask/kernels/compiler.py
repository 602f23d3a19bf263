"""The machine's C compiler: found, run, and not waited for twice if it hangs."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from gradmask.kernels.cache import write

SECONDS = 30  # a compiler that takes longer hangs: it takes half a second
_AGAIN = 3600  # seconds after which one that hung is tried again
_hung: set[str] = set()


def find_compiler() -> str:
    """The path of the C compiler: `$CC`, gcc or cc.

    Raises:
        OSError: If there is none.
    """
    if os.name != "posix":
        raise OSError("kernels are built on Linux and macOS only")
    chosen = os.environ.get("CC")
    found = next(filter(None, map(shutil.which, [chosen] if chosen else ["gcc", "cc"])), None)
    if found is None:
        raise OSError("no C compiler was found" + (f" at CC={chosen}" if chosen else ""))
    return found


def machine(compiler: str) -> str:
    """What a library depends on beside its source: a home may be shared by unlike machines.

    Args:
        compiler: Its path. It is not run for that, since it may hang.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    # What `-march=native` depends on.
    kind = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join([_identity(compiler), platform.platform(), platform.processor(), *kind[:2]])


def _identity(compiler: str) -> str:
    status = os.stat(compiler)
    return f"{compiler} {status.st_size} {status.st_mtime_ns}"


def run(command: list[str], folder: Path | None) -> None:
    """Run the compiler, unless it hung before: in this process, or within an hour.

    Args:
        command: The compiler and its arguments.
        folder: Where that is remembered; None: in this process only.

    Raises:
        OSError: If it cannot be run, or hangs.
        subprocess.CalledProcessError: If it fails.
    """
    identity = _identity(command[0])
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    note = folder / f"hung-{key}" if folder else None
    if identity in _hung or (note and _is_fresh(note)):
        raise OSError(f"{command[0]} hung, and is not tried again for an hour")
    try:
        _run(command)
    except subprocess.TimeoutExpired:
        _hung.add(identity)
        if note:
            with suppress(OSError):
                write(note, identity.encode())
        raise OSError(f"{command[0]} was stopped after {SECONDS} seconds") from None


def _is_fresh(note: Path) -> bool:
    try:
        return 0 <= time.time() - note.lstat().st_mtime < _AGAIN
    except OSError:
        return False


def _run(command: list[str]) -> None:
    # A session of its own, so that what the compiler started can be ended with it.
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"LC_ALL": "C"},
        start_new_session=True,
    ) as process:
        try:
            _, errors = process.communicate(timeout=SECONDS)
        except BaseException:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        message = errors.decode(errors="replace")
        raise subprocess.CalledProcessError(process.returncode, command, stderr=message)
