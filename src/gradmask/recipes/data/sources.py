"""Where images come from: the embedded digits, local folders and the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from gradmask.errors import DataError, OptionError
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.cache import pixels, sound_images
from gradmask.recipes.data.opening import open_splits
from gradmask.recipes.data.stored import StoredImages, default_workers

# Classes, subset and held-out images must not change with the run's seed: all runs of a
# comparison are then measured on the same images.
SPLIT_SEED = 0
TEST_SHARE = 0.2
Images: TypeAlias = Tensor | StoredImages


@dataclass(frozen=True)
class Source:
    """Everything a data set holds, before any choice is made.

    Attributes:
        images: Training images, uint8, NCHW, in memory or stored.
        labels: Their labels, int64.
        test_images: Test images of the same size.
        test_labels: Their labels.
        class_names: Name of each label.
    """

    images: Images
    labels: Tensor
    test_images: Images
    test_labels: Tensor
    class_names: tuple[str, ...]


def load_source(name: str, image_size: int | None = None, skip_damaged: bool = False) -> Source:
    """Load all images of a data set, decoded once and cached.

    The cache lies in `~/.cache/gradmask`, or where the environment variable `GRADMASK_CACHE` says.

    Args:
        name: `digits`, a folder of parquet files named `train*` and `test*` (or `validation*`), a
            folder of images by class, or a name on the Hugging Face hub.
        image_size: Take the middle of each image, of this many pixels.
        skip_damaged: Leave out images that cannot be decoded.

    Returns:
        Training and test images, grey if all of them are. Without a test split (or a validation
        split to use as one), a fixed stratified 20 % of the images.

    Raises:
        DataError: If the data cannot be found or decoded.
    """
    if name == "digits":
        return _digits(image_size)
    stored = _source(name, image_size or 0, 0, skip_damaged)
    both = cast(tuple[StoredImages, StoredImages], (stored.images, stored.test_images))
    images, test_images = map(pixels, both)
    if images.shape[2:] != test_images.shape[2:]:
        raise DataError(
            f"Images of {name} to train on {tuple(images.shape[2:])} and to test on "
            f"{tuple(test_images.shape[2:])} differ: give one size for all with --image-size."
        )
    if images.shape[1] != test_images.shape[1]:  # one of them is in colour
        images, test_images = (i.expand(-1, 3, -1, -1) for i in (images, test_images))
    return replace(stored, images=images, test_images=test_images)


def stored_source(config: Comparison) -> Source:
    """Find all images of a data set, and leave them where they are.

    Args:
        config: Options of the comparison: `data`, `image_size`, `workers` and `skip_damaged`.

    Returns:
        Training and test images, as by `load_source`, in RGB.

    Raises:
        DataError: If the data cannot be found.
    """
    workers = default_workers() if config.workers is None else config.workers
    assert config.image_size is not None  # checked with the options
    return _stored_source(config.data, config.image_size, workers, config.skip_damaged)


def in_memory(images: Images) -> Tensor:
    """The images, or an OptionError if they are stored."""
    if isinstance(images, StoredImages):
        raise OptionError(
            f"{images.where} is not in memory, as this needs it: leave streaming out."
        )
    return images


def stratified(labels: Tensor, indices: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Split indices into `size` of them and the rest, both with all classes in proportion.

    Args:
        labels: Labels of all images.
        indices: The images to split.
        size: How many to choose.

    Returns:
        The chosen indices and the rest, each sorted; the same ones every time.

    Raises:
        DataError: If a class has too few images to be split.
    """
    if size in (0, len(indices)):
        return indices[:size], indices[size:]
    try:
        parts = train_test_split(
            indices.numpy(),
            train_size=size,
            stratify=labels[indices].numpy(),
            random_state=SPLIT_SEED,
        )
    except ValueError as error:
        raise DataError(f"Cannot take {size} of {len(indices)} images by class: {error}") from error
    chosen, rest = (torch.from_numpy(np.sort(part)) for part in parts)
    return chosen, rest


def _digits(image_size: int | None) -> Source:
    pixels, targets = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels * 255 / 16).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    if image_size is not None:
        images = transforms.resize(images, [image_size, image_size])
    names = tuple(str(digit) for digit in range(10))
    return _with_test_split(images, torch.from_numpy(targets).long(), names)


def _source(name: str, size: int, workers: int, skip_damaged: bool) -> Source:
    splits = open_splits(name)
    import datasets  # slow to import, and neither digits nor wrong names need it

    if "train" not in splits:
        raise DataError(f"{name} has no train split, only: {', '.join(splits)}.")
    image_column, label_column = _columns(name, splits["train"].features)
    raw = np.asarray(splits["train"][label_column])
    names = getattr(splits["train"].features[label_column], "names", None)
    known = np.unique(raw) if names is None else np.arange(len(names))
    class_names = tuple(str(value) for value in (known if names is None else names))

    def part(split: str) -> tuple[StoredImages, Tensor]:
        where = f"{name} ({split})"
        labels = _label_indices(np.asarray(splits[split][label_column]), known, where)
        rows = splits[split].select_columns(image_column)
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
        stored = StoredImages(rows, image_column, where, torch.arange(len(rows)), size, workers)
        stored = sound_images(stored) if skip_damaged else stored
        return stored, labels[stored.indices]

    images, labels = part("train")
    test = next((s for s in ("test", "validation") if _labelled(splits, s, label_column)), None)
    if test is None:
        return _with_test_split(images, labels, class_names)
    return Source(images, labels, *part(test), class_names)


_stored_source = lru_cache(maxsize=1)(_source)  # every run of a comparison asks for the same


def _labelled(splits: Any, split: str, label_column: str) -> bool:
    """Whether a split is there with its labels; those of ImageNet's test images are all -1."""
    if split not in splits:
        return False
    labels = np.asarray(splits[split][label_column])
    return not (np.issubdtype(labels.dtype, np.number) and len(labels) and (labels == -1).all())


def _columns(name: str, features: Any) -> tuple[str, str]:
    import datasets

    images = [key for key, value in features.items() if isinstance(value, datasets.Image)]
    classes = [key for key, value in features.items() if isinstance(value, datasets.ClassLabel)]
    labels = [key for key in ("label", "fine_label") if key in features] + classes
    if not images or not labels:
        kind = "image" if not images else "label"
        raise DataError(f"{name} has no {kind} column. Its columns: {', '.join(features)}.")
    return images[0], labels[0]


def _label_indices(raw: NDArray[Any], known: NDArray[Any], where: str) -> Tensor:
    unknown = np.flatnonzero(~np.isin(raw, known))
    if len(unknown):
        index = int(unknown[0])
        raise DataError(f"Label {raw[index]} of image {index} of {where} is not a known class.")
    return torch.from_numpy(np.searchsorted(known, raw)).long()


def _with_test_split(images: Images, labels: Tensor, class_names: tuple[str, ...]) -> Source:
    count = len(labels)
    test, train = stratified(labels, torch.arange(count), round(TEST_SHARE * count))
    return Source(images[train], labels[train], images[test], labels[test], class_names)
