"""Sums by which data and weights are known again.

A sum is BLAKE2b (128 bits) of names, shapes, types and bytes. Of images that are streamed, their
bytes are not all read: each counts with its size and 4 KiB of its middle, and a file with its name
and that of its folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmask.errors import DataError
from gradmask.recipes.data.images import ImageData
from gradmask.recipes.data.stored import StoredImages

_SAMPLE = 4096


def tensors_sum(tensors: Mapping[str, Tensor]) -> str:
    """The sum of named tensors, on any device."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        _add(digest, name, tensor)
    return digest.hexdigest()


def data_sum(data: ImageData) -> str:
    """The sum of all images, their true labels and class names: the same for all arms and seeds."""
    digest = hashlib.blake2b(repr(data.class_names).encode(), digest_size=16)
    for name, value in sorted(vars(data).items()):
        if isinstance(value, StoredImages):
            for described in _stored(value):
                digest.update(described)
        elif isinstance(value, Tensor) and name != "train_labels":
            _add(digest, name, value)
    return digest.hexdigest()


def check_data(expected: str | None, found: str, where: Path) -> None:
    """Refuse other data than earlier runs had.

    Args:
        expected: Their sum; None if an earlier version did not write it.
        found: The sum of the data as they are now.
        where: The file with the first.

    Raises:
        DataError: If the sums differ.
    """
    if expected not in (None, found):
        raise DataError(
            f"The images or labels are not those that {where} was made with (sum {found}, not "
            f"{expected}): what was measured on different data cannot be compared. Bring them "
            "back, or choose another --output."
        )


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    whole = tensor.detach().cpu().contiguous()
    digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
    digest.update(whole.reshape(-1).view(torch.uint8).numpy().data if whole.numel() else b"")


def _stored(images: StoredImages) -> Iterator[bytes]:
    column = images.rows.data[images.column]
    for row in images.indices.tolist():
        stored = column[row]
        contents = stored["bytes"].as_buffer()
        if contents is not None:
            start = max(0, contents.size - _SAMPLE) // 2
            yield b"%d\0" % contents.size + contents[start : start + _SAMPLE].to_pybytes()
            continue
        path = Path(stored["path"].as_py())
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(max(0, size - _SAMPLE) // 2)
                yield f"{path.parent.name}/{path.name}\0{size}\0".encode() + file.read(_SAMPLE)
        except OSError as error:
            raise DataError(f"Cannot read {path}: {error.strerror}.") from error
