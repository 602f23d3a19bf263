"""Files that are never seen half written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Write a file so that a reader finds the old contents or the new, never a part.

    Args:
        path: Where to write; its folder must exist.
        contents: Text, written as UTF-8, or bytes.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(contents.encode() if isinstance(contents, str) else contents)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
