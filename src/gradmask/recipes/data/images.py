"""The images of one run: splits, label noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradmask.errors import DataError
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.sources import (
    SPLIT_SEED,
    Images,
    Source,
    load_source,
    stored_source,
    stratified,
)
from gradmask.seeding import seeded_generator


@dataclass(frozen=True)
class ImageData:
    """Images (uint8, NCHW, in memory or stored) and labels (int64) of one run.

    Attributes:
        train_images: Training images.
        train_labels: Training labels, possibly noisy.
        train_clean_labels: Training labels before noise.
        val_images: Images held out of the training images.
        val_labels: Their labels, always clean.
        test_images: Test images.
        test_labels: Their labels, always clean.
        class_names: Name of each label.
    """

    train_images: Images
    train_labels: Tensor
    train_clean_labels: Tensor
    val_images: Images
    val_labels: Tensor
    test_images: Images
    test_labels: Tensor
    class_names: tuple[str, ...]

    def to(self, device: torch.device) -> ImageData:
        """The same images and labels on another device; stored images stay where they are."""
        tensors: dict[str, Any] = {
            k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)
        }
        return replace(self, **tensors)


def load_images(config: Comparison, seed: int) -> ImageData:
    """Load the images of a comparison and make its choices in order.

    Classes are chosen first, then `train_size` images, then the validation share of those is held
    out (all with a fixed seed); at last labels of the remaining training images are made noisy,
    or random, with `seed`. A data set without a test split gives up a fixed stratified 20 % of its
    images.

    Args:
        config: Options of the comparison.
        seed: Seed of the label noise.

    Returns:
        Images and labels of the run.

    Raises:
        DataError: If the data cannot be found, decoded, or are fewer than asked for.
    """
    source = (
        stored_source(config)
        if config.streaming
        else load_source(config.data, config.image_size, config.skip_damaged)
    )
    source = _choose_classes(source, config.classes)
    available = len(source.labels)
    train_size = available if config.train_size is None else config.train_size
    if train_size > available:
        raise DataError(f"train_size={train_size} is more than the {available} training images.")
    chosen, _ = stratified(source.labels, torch.arange(available), train_size)
    held_out = round(config.validation * train_size)
    val, train = stratified(source.labels, chosen, held_out)
    if not len(val) or not len(train):
        raise DataError(
            f"validation={config.validation} of {train_size} images leaves {len(train)} images to "
            f"train on and {len(val)} to validate on: both must be at least 1."
        )
    clean = source.labels[train]
    return ImageData(
        train_images=source.images[train],
        train_labels=_given_labels(config, clean, len(source.class_names), seed),
        train_clean_labels=clean,
        val_images=source.images[val],
        val_labels=source.labels[val],
        test_images=source.test_images,
        test_labels=source.test_labels,
        class_names=source.class_names,
    )


def _choose_classes(source: Source, classes: int | None) -> Source:
    available = len(source.class_names)
    if classes is None:
        return source
    if classes > available:
        raise DataError(f"classes={classes} is more than the {available} classes of the data.")
    order = torch.randperm(available, generator=torch.Generator().manual_seed(SPLIT_SEED))
    chosen = order[:classes].sort().values
    new_label = torch.full((available,), -1).scatter(0, chosen, torch.arange(classes))
    train = new_label[source.labels] >= 0
    test = new_label[source.test_labels] >= 0
    return Source(
        images=source.images[train],
        labels=new_label[source.labels[train]],
        test_images=source.test_images[test],
        test_labels=new_label[source.test_labels[test]],
        class_names=tuple(source.class_names[label] for label in chosen.tolist()),
    )


def _given_labels(config: Comparison, clean: Tensor, classes: int, seed: int) -> Tensor:
    if config.labels == "given":
        return _with_noise(clean, classes, config.label_noise, seed)
    generator = seeded_generator(seed, "random labels")
    return torch.randint(classes, clean.shape, generator=generator)


def _with_noise(labels: Tensor, classes: int, share: float, seed: int) -> Tensor:
    count = round(share * len(labels))
    if count and classes < 2:
        raise DataError("label_noise needs at least 2 classes.")
    if not count:
        return labels.clone()
    generator = seeded_generator(seed, "label noise")
    noisy = torch.randperm(len(labels), generator=generator)[:count]
    # An offset of 1 to K - 1 makes each of the other classes equally likely.
    offset = torch.randint(1, classes, (count,), generator=generator)
    return labels.scatter(0, noisy, (labels[noisy] + offset) % classes)
