"""Files that are never seen half written, of tensors among others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from gradmask.errors import StateError


@contextmanager
def atomic_path(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Where to write a new file, which takes the place of an old one once it is on the disk.

    Args:
        path: The file; its folder must exist.
        previous: Where the old file goes, if there is one (default: it is given up).

    Yields:
        The path to write to. If writing fails, nothing has changed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_file(path: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """The same, opened for writing.

    Args:
        path: The file; its folder must exist.
        previous: Where the old file goes, if there is one (default: it is given up).

    Yields:
        The new file.
    """
    with atomic_path(path, previous) as temporary, temporary.open("wb") as file:
        yield file


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], what: str
) -> None:
    """Write a safetensors file; a reader finds the old file or the new, never a part.

    Args:
        path: The file; its folder must exist.
        tensors: What to write, by name.
        header: Words to be read with it.
        what: What the file holds, for messages.

    Raises:
        ImportError: If safetensors is not installed.
    """
    library = _safetensors(what)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        library.torch.save_file(plain, temporary, dict(header))


@contextmanager
def open_tensors(path: str | Path, what: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """Open a safetensors file; whatever is wrong with its contents is a `StateError`.

    Args:
        path: The file.
        what: What it should hold, for messages.

    Yields:
        The open file, with `keys` and `get_tensor`, and its header.

    Raises:
        StateError: If it cannot be read, or is read as what it is not.
        ImportError: If safetensors is not installed.
    """
    library = _safetensors(what)
    wrong = (OSError, library.SafetensorError, ValueError, KeyError, TypeError, RuntimeError)
    try:
        with library.safe_open(path, framework="pt") as file:
            yield file, file.metadata() or {}
    except StateError:
        raise
    except wrong as error:
        words = " ".join(str(error).split())[:200]
        raise StateError(f"{path} cannot be read as a file of {what} ({words}).") from error


def _safetensors(what: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"Files of {what} need safetensors: pip install safetensors") from error
    return safetensors
