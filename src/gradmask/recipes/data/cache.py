"""What was made of images once and is kept: their pixels, and which of them are damaged."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from gradmask.errors import DataError
from gradmask.recipes.data.decoding import middle
from gradmask.recipes.data.folders import warn_once
from gradmask.recipes.data.stored import StoredImages, damaged
from gradmask.study.files import keep, read_kept
from gradmask.study.progress import EVERY, duration
from gradmask.study.world import current_world

_DECODER = 2  # changes with the pixels that are made of a file
_ELSEWHERE = "point GRADMASK_CACHE to a folder of your own."
_PARTS = ("images", "damaged", "datasets")  # kernels are small, and compiled again each time
Made = TypeVar("Made")
Item = TypeVar("Item")
Sizes = tuple[int, int, int, int]  # smallest height and width before images are cut, and largest


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


def show_cache(console: Console, clear: bool = False) -> None:
    """List what the cache holds, with sizes; or remove it.

    Args:
        console: Where to print.
        clear: Remove all decoded images and prepared data sets; they are made again when needed.
    """
    root, whole = _cache(), 0
    for part in _PARTS:
        for entry in sorted((root / part).glob("*")):
            files = [entry] if entry.is_file() else entry.rglob("*")
            size = sum(file.lstat().st_size for file in files)
            whole += size
            if clear:
                entry.unlink() if entry.is_file() else shutil.rmtree(entry, ignore_errors=True)
            elif entry.suffix != ".lock":
                line = f"{_bytes(size):>9}  {part}/{entry.name}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    ending = "removed from" if clear else "in"
    mend = "" if clear or not whole else " `gradmask cache --clear` removes it."
    words = f"{_bytes(whole)} {ending} {root}.{mend}"
    console.print(words, markup=False, highlight=False, soft_wrap=True)


def _bytes(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _kept(part: str, images: StoredImages, size: int, make: Callable[[], Made]) -> Made:
    """What was made of these images earlier, or is made now; a cache need not be written."""
    words = f"{images.rows._fingerprint} {images.column} {_DECODER} {size}"
    rows = images.indices.numpy().tobytes()
    key = hashlib.sha256(words.encode() + rows).hexdigest()[:32]
    title = re.sub(r"[^A-Za-z0-9]+", "-", os.path.basename(images.where)).strip("-")[:60]
    name = f"{title}-{key}.pt"
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
    words = f"Looking for damaged images of {images.where}"

    def make() -> dict[int, str]:
        rows = followed(damaged(images), len(images), words)
        return {row: message for row, message in rows if message}

    found = _kept("damaged", images, 0, make)
    if found:
        first = next(iter(found.values())).split(". Mend it")[0]
        warn_once(
            f"{len(found)} damaged of {len(images)} images of {images.where} are left out. "
            f"The first: {first}"
        )
    return images[torch.tensor([i for i in range(len(images)) if i not in found], dtype=torch.long)]


def pixels(images: StoredImages) -> tuple[Tensor, Sizes]:
    """All images in memory, decoded once.

    Args:
        images: The images.

    Returns:
        uint8 (N, C, height, width), grey if all of them are; and the sizes they had.

    Raises:
        DataError: If one is damaged or of another size, or there is none.
    """
    found, sizes = _kept("images", images, images.size, lambda: _decode(images))
    return found, sizes


def _decode(images: StoredImages) -> tuple[Tensor, Sizes]:
    arrays: list[np.ndarray] = []
    sizes: set[tuple[int, int]] = set()
    words = f"Decoding {images.where}"
    for index in followed(range(len(images)), len(images), words):
        image = images.open(index)
        sizes.add(image.size)
        array = np.asarray(middle(image, images.size) if images.size else image)
        if arrays and array.shape[:2] != arrays[0].shape[:2]:
            (height, width), (other, wide) = array.shape[:2], arrays[0].shape[:2]
            raise DataError(
                f"{images.name(index)} is {height} x {width} pixels, not {other} x {wide}: give "
                "one size for all with --image-size."
            )
        arrays.append(array)
    if not arrays:
        raise DataError(f"{images.where} has no images.")
    if len({array.ndim for array in arrays}) == 2:  # grey images among colour images
        arrays = [np.stack([a] * 3, axis=-1) if a.ndim == 2 else a for a in arrays]
    stacked = np.stack(arrays)
    channels_first = stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)
    widths, heights = zip(*sizes, strict=True)
    found = torch.from_numpy(np.ascontiguousarray(channels_first))
    return found, (min(heights), min(widths), max(heights), max(widths))


def followed(items: Iterable[Item], total: int, words: str) -> Iterator[Item]:
    """Pass items on and say on stderr how far it is: a bar, or a line now and then.

    Args:
        items: What is worked on.
        total: How many they are.
        words: What is done.

    Yields:
        The items.
    """
    console = Console(stderr=True, soft_wrap=True, quiet=not current_world().is_main)
    if console.is_terminal:
        yield from track(items, words, total=total, console=console, transient=True)
        return
    began = told = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if (now := time.monotonic()) - told >= EVERY:
            told = now
            left = duration((now - began) * (total - done) / done)
            line = f"{words}: {done} of {total}, about {left} left"
            console.print(line, markup=False, highlight=False)
