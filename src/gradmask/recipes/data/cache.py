"""What was made of images once and is kept: their pixels, and which of them are damaged."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradmask.errors import DataError
from gradmask.recipes.data.decoding import middle
from gradmask.recipes.data.folders import warn_once
from gradmask.recipes.data.stored import StoredImages, damaged
from gradmask.study.files import keep, read_kept

_DECODER = 2  # changes with the pixels that are made of a file
_ELSEWHERE = "point GRADMASK_CACHE to a folder of your own."
Made = TypeVar("Made")


def cache_folder(part: str) -> Path:
    """A folder in `~/.cache/gradmask`, or where `GRADMASK_CACHE` says; made if need be.

    Args:
        part: Its name there.

    Raises:
        DataError: If it cannot be written into.
    """
    folder = _cache() / part
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK) else "it is read-only"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise DataError(f"Cannot write into {folder} ({reason}): {_ELSEWHERE}")
    return folder


def _cache() -> Path:
    try:
        return Path(os.environ.get("GRADMASK_CACHE") or Path.home() / ".cache" / "gradmask")
    except RuntimeError as error:
        raise DataError(f"There is no home folder for the cache: {_ELSEWHERE}") from error


def _kept(part: str, images: StoredImages, size: int, make: Callable[[], Made]) -> Made:
    """What was made of these images earlier, or is made now; a cache need not be written."""
    words = f"{images.rows._fingerprint} {images.column} {_DECODER} {size}"
    rows = images.indices.numpy().tobytes()
    key = hashlib.sha256(words.encode() + rows).hexdigest()[:32]
    name = f"{key}.pt"
    found: Made | None = read_kept(_cache() / part / name, key)
    if found is None:
        found = make()
        try:
            keep(cache_folder(part) / name, key, found)
        except (DataError, OSError) as error:
            warn_once(f"Images are decoded anew at each start. {error}")
    return found


def sound_images(images: StoredImages) -> StoredImages:
    """The images that can be decoded; found once for a data set.

    Args:
        images: All images of a data set.

    Returns:
        Those that are not damaged. A warning says how many are.
    """
    found = _kept("damaged", images, 0, lambda: dict(damaged(images)))
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
    return _kept("images", images, images.size, lambda: torch.from_numpy(_decode(images)))


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
