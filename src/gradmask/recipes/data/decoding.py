"""One decoder for all images, in memory and streamed."""

from __future__ import annotations

from contextlib import suppress
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

CENTRE = 0.875  # 224 of 256 pixels, as in torchvision's reference recipe
_MOST = {"I": 65535, "F": 1}  # white in modes of more than 8 bits, by their first letter


def decode(source: str | BinaryIO) -> Image.Image:
    """Decode an image as viewers show it: upright, its first frame, in 8 bits.

    Integers of 16 or more bits are taken to go from 0 to 65535, floats from 0 to 1. Transparency is
    dropped, and the colours below it are kept.

    Args:
        source: A file's path, or an open one.

    Returns:
        The image, in mode L if it is grey, and in RGB otherwise.

    Raises:
        Exception: Whatever Pillow raises for bytes that are no image; a ValueError for pixels out
            of range.
    """
    with Image.open(source) as image:
        image.load()
        with suppress(Exception):  # EXIF that is damaged says nothing; the pixels are there
            ImageOps.exif_transpose(image, in_place=True)
        image.info.pop("transparency", None)  # or `convert` warns that it drops it
        mode = "L" if Image.getmodebase(image.mode) == "L" else "RGB"
        shallow = _eight_bits(image) if image.mode[0] in _MOST else image
        return shallow if shallow.mode == mode else shallow.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    values, most = np.asarray(image), _MOST[image.mode[0]]
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= most:  # nor is NaN
        raise ValueError(f"its values go from {low:g} to {high:g}, and must lie in 0 to {most}")
    return Image.fromarray((values * (255 / most)).round().astype(np.uint8))


def middle(image: Image.Image, size: int) -> Image.Image:
    """The middle of an image, to measure on, as torchvision's reference recipe cuts it.

    An image is not enlarged to be cut: one that has the size already stays as it is.

    Args:
        image: The image.
        size: Height and width of the result.

    Returns:
        A square image in the same mode.
    """
    kept = max(CENTRE, min(1.0, size / min(image.size)))
    bilinear = Image.Resampling.BILINEAR
    return ImageOps.fit(image, (size, size), bilinear, bleed=(1 - kept) / 2)
