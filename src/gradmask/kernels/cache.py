"""Where compiled kernels are kept, and whether what lies there may be loaded.

To load a library is to run it. So it must be whole, by a check sum beside it, and a regular file
that nobody but this user can change, nor any of the folders that lead to it. Nothing here waits
for another process: a file appears whole or not at all, and what a killed one left is cleared
later.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

STALE = 600  # seconds after which no process works with a temporary file any more
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def find_folder() -> Path | None:
    """The folder for libraries: in the cache, or among temporary files; None if neither is safe."""
    for place in _places():
        try:
            folder = place.resolve() / "kernels"
            for part in (*reversed(folder.parents), folder):
                part.mkdir(mode=0o700, exist_ok=True)
            if is_safe(folder) and os.access(folder, os.W_OK):
                return folder
        except (OSError, RuntimeError):  # read-only, no folder, links in a circle
            continue
    return None


def _places() -> Iterator[Path]:
    root = os.environ.get("GRADMASK_CACHE")
    with suppress(RuntimeError):  # no home
        yield Path(root) if root else Path.home() / ".cache" / "gradmask"
    yield Path(tempfile.gettempdir(), f"gradmask-{os.geteuid()}")


def is_safe(folder: Path) -> bool:
    """Whether nobody else can change what is in a folder, or put another one in its place.

    Args:
        folder: Its path, without links.
    """
    trusted = {os.geteuid(), 0, os.stat("/").st_uid}  # who owns the root can do anything
    for above in folder.parents:
        status = above.lstat()
        sticky = status.st_mode & stat.S_ISVTX  # others cannot rename what is not theirs
        if status.st_uid not in trusted or (status.st_mode & _OTHERS and not sticky):
            return False
    return _is_own(folder, stat.S_ISDIR)


def _is_own(path: Path, kind: Callable[[int], bool]) -> bool:
    status = path.lstat()
    own = status.st_uid == os.geteuid() and not status.st_mode & _OTHERS
    return own and kind(status.st_mode)


def find(folder: Path, name: str) -> Path | None:
    """A library that was stored, if it may be loaded.

    Args:
        folder: What `find_folder` returned.
        name: Its name.
    """
    library, total = _files(folder, name)
    try:
        if not all(_is_own(path, stat.S_ISREG) for path in (library, total)):
            return None
        return library if _sum(library.read_bytes()) == total.read_bytes() else None
    except OSError:
        return None


def store(folder: Path, name: str, content: bytes) -> Path | None:
    """Store a library, in place of what is there.

    Args:
        folder: What `find_folder` returned.
        name: Its name.
        content: All of its file.

    Returns:
        Its path; None if it cannot be written.
    """
    library, total = _files(folder, name)
    try:
        sweep(folder, "tmp")
        write(total, _sum(content))
        write(library, content)
    except OSError:
        return None
    return library


def write(path: Path, content: bytes) -> None:
    """Write a file that appears whole, or not at all.

    Args:
        path: Where; a file or link there is replaced.
        content: All of it.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # for this user alone
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def sweep(folder: Path, prefix: str) -> None:
    """Remove what killed processes of this user left behind.

    Args:
        folder: Where temporary files and folders are made.
        prefix: What their names begin with.
    """
    for path in folder.glob(f"{prefix}*"):
        try:
            status = path.lstat()
            if status.st_uid != os.geteuid() or time.time() - status.st_mtime < STALE:
                continue
            if stat.S_ISDIR(status.st_mode):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        except OSError:  # another process was as quick
            continue


def _files(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.so", folder / f"{name}.sha256"


def _sum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
