"""Where images come from: the embedded digits, local folders and the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from gradmask.errors import DataError, OptionError
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.cache import Sizes, pixels, sound_images
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
        test_from: The split that the test images are of.
        val_images: Validation images of its own, if they are wanted and not needed to test on.
        val_labels: Their labels.
    """

    images: Images
    labels: Tensor
    test_images: Images
    test_labels: Tensor
    class_names: tuple[str, ...]
    test_from: str = "test"
    val_images: Images | None = None
    val_labels: Tensor | None = None


def open_source(config: Comparison) -> Source:
    """Find all images of a data set, and leave those of files where they are.

    Args:
        config: Options of the comparison: `data`, `labels_csv`, `image_size`, `streaming`,
            `workers` and `skip_damaged`, and `validation` for whether the data's own
            validation images are wanted.

    Returns:
        Training, validation and test images. Without a test split these are its validation images,
        and without those a fixed stratified 20 % of the training images.

    Raises:
        DataError: If the data cannot be found.
    """
    if config.data == "digits":
        return _digits(config.image_size)
    if config.streaming:
        return stored_source(config)
    own = config.validation is None
    return _source(
        config.data, config.image_size or 0, 0, config.skip_damaged, config.labels_csv, own
    )


def stored_source(config: Comparison) -> Source:
    """The same for images that are decoded by workers, found once for all runs."""
    workers = default_workers() if config.workers is None else config.workers
    assert config.image_size is not None  # checked with the options
    own = config.validation is None
    return _stored_source(
        config.data, config.image_size, workers, config.skip_damaged, config.labels_csv, own
    )


def decode_all(name: str, parts: Sequence[Images]) -> tuple[list[Tensor], Sizes | None]:
    """Decode the parts of a data set, alike in size and colours.

    Args:
        name: The data set, for messages.
        parts: Images of each part; those in memory stay as they are.

    Returns:
        uint8 images of each part, grey if all of them are; and the sizes they had.

    Raises:
        DataError: If an image cannot be decoded, or they differ in size.
    """
    stored = [part for part in parts if isinstance(part, StoredImages)]
    if not stored:
        return [in_memory(part) for part in parts], None
    found = [pixels(part) for part in stored]
    images, sizes = [tensor for tensor, _ in found], list(zip(*(s for _, s in found), strict=True))
    shapes = list(dict.fromkeys(tuple(part.shape[2:]) for part in images))
    if len(shapes) > 1:
        raise DataError(
            f"Images of {name} to train, validate and test on differ in size, {shapes[0]} and "
            f"{shapes[1]}: give one size for all with --image-size."
        )
    if len({part.shape[1] for part in images}) > 1:  # some of them are in colour
        images = [part.expand(-1, 3, -1, -1) for part in images]
    return images, (min(sizes[0]), min(sizes[1]), max(sizes[2]), max(sizes[3]))


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


def _source(
    name: str, size: int, workers: int, skip_damaged: bool, labels_csv: str | None, own: bool
) -> Source:
    splits = open_splits(name, labels_csv)
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
    tests = [s for s in ("test", "validation") if _labelled(splits, s, label_column)]
    if not tests:
        return _with_test_split(images, labels, class_names)
    validation = part("validation") if own and len(tests) == 2 else (None, None)
    return Source(images, labels, *part(tests[0]), class_names, tests[0], *validation)


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
    parts = images[train], labels[train], images[test], labels[test]
    return Source(*parts, class_names, test_from="train")
