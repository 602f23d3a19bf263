"""Files that are never seen half written, and the one place that reads them again."""

from __future__ import annotations

import json
import math
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml

from gradmask.errors import StateError
from gradmask.tensor_files import atomic_file

_TEMPORARY = re.compile(r"\.(.+\.\d+|checkpoint\.shards)\.tmp")
_OURS = ("runs/*", "runs/*/weights", "figures", "audit/*", "audit/*/measured")
_DELETE = "delete the run's folder and train again."


def is_temporary(path: Path) -> bool:
    """Whether a file is the unfinished one of a process that is writing, or was killed at it."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_temporaries(folder: Path) -> None:
    """Remove the unfinished files of processes that were killed as they wrote.

    Args:
        folder: A folder that this tool made; only places in it that runs write to are looked at.
    """
    root = folder.resolve()
    places = [folder, *(place for pattern in _OURS for place in folder.glob(pattern))]
    for place in [p for p in places if p.is_dir() and p.resolve().is_relative_to(root)]:
        for path in filter(is_temporary, list(place.iterdir())):
            if path.is_dir() and not path.is_symlink():  # of a checkpoint in shards
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


def damaged(path: Path, reason: object, mend: str) -> StateError:
    """The one error for a file that cannot be used as it is.

    Args:
        path: The file.
        reason: What is wrong with it.
        mend: What to do.
    """
    words = " ".join(str(reason).split()) or type(reason).__name__
    return StateError(f"{path} is damaged ({words[:200]}): {mend}")


def read_text(path: Path, mend: str) -> str:
    """Read a text file, or raise a StateError that names it."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise damaged(path, getattr(error, "strerror", None) or error, mend) from error


def read_json(path: Path, mend: str) -> Any:
    """Read JSON, or raise a StateError that names the file."""
    text = read_text(path, mend)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, error, mend) from error


def read_yaml(path: Path, mend: str) -> dict[str, Any]:
    """Read a mapping from YAML, or raise a StateError that names the file."""
    text = read_text(path, mend)
    try:
        found = yaml.safe_load(text)  # not the C loader: deep nesting ends the process
    except Exception as error:  # PyYAML lets errors of its constructors through
        raise damaged(path, error, mend) from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise damaged(path, "it holds no options", mend)
    return found


def read_tensors(path: Path, mend: str = _DELETE) -> Any:
    """Read a file that `torch.save` wrote, without pickle, after a check of its sums.

    Args:
        path: The file; it must exist.
        mend: What to do if it is damaged, for the message.

    Returns:
        Its contents, tensors on the CPU.

    Raises:
        StateError: If it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself checks no sums
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise zipfile.BadZipFile("torch compresses nothing")
            if (name := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the sum of {name!r} is another")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # spoilt bytes lead zipfile and torch to raise anything
        raise damaged(path, error, mend) from error


def keep(path: Path, key: Any, made: Any) -> None:
    """Keep what was made of something else, with sums.

    Args:
        path: Where to write; its folder must exist.
        key: Plain values by which it is known again.
        made: Tensors and plain values.
    """
    with atomic_file(path) as file:
        torch.save({"key": key, "made": made}, file)


def read_kept(path: Path, key: Any) -> Any:
    """What `keep` has written; None if that is missing, damaged or of another key."""
    try:
        found = read_tensors(path)
        return found["made"] if found["key"] == key else None
    except Exception:  # or of another version
        return None


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, in lines that are short enough to read and compare.

    Args:
        path: Where to write; its folder must exist.
        value: What to write; numbers that are not finite are written as null.
    """
    write_atomically(path, _dump(value) + "\n")


def to_json(value: Any) -> str:
    """Valid JSON in one line; numbers that are not finite, which JSON lacks, become null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def _dump(value: Any, indent: str = "") -> str:
    """JSON with one line for each epoch, option and parameter."""
    inner = indent + "  "
    if isinstance(value, dict) and "epoch" not in value:
        lines = [f"{inner}{json.dumps(str(k))}: {_dump(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(v, dict | list) for v in value):
        return "[\n" + ",\n".join(inner + _dump(v, inner) for v in value) + f"\n{indent}]"
    return to_json(value)
