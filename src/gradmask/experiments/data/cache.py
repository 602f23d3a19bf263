"""What was made of images once and is kept: their pixels, and which of them are damaged."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradmask.errors import DataError
from gradmask.experiments.data.decoding import middle
from gradmask.experiments.data.folders import warn_once
from gradmask.experiments.data.stored import StoredImages, damaged
from gradmask.experiments.files import atomic_file, write_atomically

_DECODER = 2  # changes with the pixels that are made of a file
_UNREADABLE = (OSError, ValueError, EOFError)  # not there yet, or cut off: made again


def cache_folder(part: str) -> Path:
    """A folder in `~/.cache/gradmask`, or where `GRADMASK_CACHE` says; made if need be."""
    root = os.environ.get("GRADMASK_CACHE") or Path.home() / ".cache" / "gradmask"
    folder = Path(root) / part
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _key(images: StoredImages, *options: int) -> str:
    words = f"{images.rows._fingerprint} {images.column} {_DECODER} {options}"
    return hashlib.sha256(words.encode() + images.indices.numpy().tobytes()).hexdigest()[:32]


def sound_images(images: StoredImages) -> StoredImages:
    """The images that can be decoded; found once for a data set.

    Args:
        images: All images of a data set.

    Returns:
        Those that are not damaged. A warning says how many are.
    """
    path = cache_folder("damaged") / f"{_key(images)}.json"
    found: dict[int, str] | None = None
    with suppress(*_UNREADABLE, TypeError):
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    if found is None:
        found = dict(damaged(images))
        write_atomically(path, json.dumps(list(found.items())))
    if found:
        first = next(iter(found.values())).split(". Mend it")[0]
        warn_once(
            f"{len(found)} damaged of {len(images)} images of {images.where} are left out. "
            f"The first: {first}"
        )
    return images[torch.tensor([i for i in range(len(images)) if i not in found], dtype=torch.long)]


def pixels(images: StoredImages) -> Tensor:
    """All images in memory, decoded once.

    Args:
        images: The images.

    Returns:
        uint8 (N, C, height, width), grey if all of them are.

    Raises:
        DataError: If one is damaged or of another size, or there is none.
    """
    path = cache_folder("images") / f"{_key(images, images.size)}.npy"
    with suppress(*_UNREADABLE):
        return torch.from_numpy(np.load(path, allow_pickle=False))
    array = _decode(images)
    with atomic_file(path) as file:
        np.save(file, array, allow_pickle=False)
    return torch.from_numpy(array)


def _decode(images: StoredImages) -> NDArray[np.uint8]:
    arrays: list[NDArray[np.uint8]] = []
    for place in range(len(images)):
        image = images.open(place)
        array = np.asarray(middle(image, images.size) if images.size else image)
        if arrays and array.shape[:2] != arrays[0].shape[:2]:
            (height, width), (other, wide) = array.shape[:2], arrays[0].shape[:2]
            raise DataError(
                f"{images.name(place)} is {height} x {width} pixels, not {other} x {wide}: give "
                "one size for all with --image-size."
            )
        arrays.append(array)
    if not arrays:
        raise DataError(f"{images.where} has no images.")
    if len({array.ndim for array in arrays}) == 2:  # grey images among colour images
        arrays = [np.stack([a] * 3, axis=-1) if a.ndim == 2 else a for a in arrays]
    stacked = np.stack(arrays)
    channels_first = stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(channels_first)
