"""Files that are never seen half written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from gradmask.errors import StateError


@contextmanager
def atomic_file(path: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of an old one once it is whole and on the disk.

    Args:
        path: Where to write; its folder must exist.
        previous: Where the old file goes, if there is one (default: it is given up).

    Yields:
        The new file, open for writing. If writing it fails, nothing has changed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_temporary(path: Path) -> bool:
    """Whether a file is the unfinished one of a process that is writing, or was killed at it."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def remove_temporaries(folder: Path) -> None:
    """Remove the unfinished files of processes that were killed as they wrote."""
    for path in filter(is_temporary, list(folder.rglob("*"))):
        if path.is_dir():  # of a checkpoint in shards
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Write a file so that a reader finds the old contents or the new, never a part.

    Args:
        path: Where to write; its folder must exist.
        contents: Text, written as UTF-8, or bytes.
    """
    with atomic_file(path) as file:
        file.write(contents.encode() if isinstance(contents, str) else contents)


def read_tensors(path: Path) -> Any:
    """Read a file that `torch.save` wrote, without pickle, after a check of its sums.

    Args:
        path: The file; it must exist.

    Returns:
        Its contents, tensors on the CPU.

    Raises:
        StateError: If it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself checks no sums
            sound = archive.testzip() is None
        if sound:
            return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile):
        pass
    raise StateError(f"{path} is damaged: delete the run's folder and train again.")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, in lines that are short enough to read and compare.

    Args:
        path: Where to write; its folder must exist.
        value: What to write.
    """
    write_atomically(path, _dump(value) + "\n")


def _dump(value: Any, indent: str = "") -> str:
    """JSON with one line for each epoch, option and parameter."""
    inner = indent + "  "
    if isinstance(value, dict) and "epoch" not in value:
        lines = [f"{inner}{json.dumps(str(k))}: {_dump(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(v, dict | list) for v in value):
        return "[\n" + ",\n".join(inner + _dump(v, inner) for v in value) + f"\n{indent}]"
    return json.dumps(value)
