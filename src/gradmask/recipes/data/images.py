"""The images of one run: splits, label noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradmask.audit import Planted, plant
from gradmask.errors import DataError
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.cache import Sizes
from gradmask.recipes.data.sources import (
    SPLIT_SEED,
    Images,
    Source,
    decode_all,
    in_memory,
    open_source,
    stratified,
)
from gradmask.recipes.data.stored import StoredImages
from gradmask.seeding import seeded_generator

HELD_OUT = 0.1  # of the training images, where there are no validation images


@dataclass(frozen=True)
class ImageData:
    """Images (uint8, NCHW, in memory or stored) and labels (int64) of one run.

    Attributes:
        train_images: Training images.
        train_labels: Training labels, possibly noisy or planted.
        train_clean_labels: Training labels before noise.
        val_images: Images to choose an epoch on.
        val_labels: Their labels, always clean.
        test_images: Test images.
        test_labels: Their labels, always clean.
        class_names: Name of each label.
        found: What was found, in a sentence.
        planted: Training images whose label was made wrong on purpose, if there are some.
        stored: The training images where they are stored, which have names, or None.
    """

    train_images: Images
    train_labels: Tensor
    train_clean_labels: Tensor
    val_images: Images
    val_labels: Tensor
    test_images: Images
    test_labels: Tensor
    class_names: tuple[str, ...]
    found: str = ""
    planted: Planted | None = None
    stored: StoredImages | None = None

    def to(self, device: torch.device) -> ImageData:
        """The same images and labels on another device; stored images stay where they are."""
        tensors: dict[str, Any] = {
            k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)
        }
        return replace(self, **tensors)

    def only(self, **parts: Tensor) -> ImageData:
        """The same with some of the images only.

        Args:
            parts: Of `train`, `val` or `test`, the places of those to keep, or a mask of them.
        """
        names = (n for n in vars(self) if n.endswith(("images", "labels")))
        found = {n: parts[n.partition("_")[0]] for n in names if n.partition("_")[0] in parts}
        chosen: dict[str, Any] = {name: getattr(self, name)[kept] for name, kept in found.items()}
        return replace(self, **chosen)


def load_images(config: Comparison, seed: int) -> ImageData:
    """Load the images of a comparison and make its choices in order.

    Classes are chosen first, then `train_size` and `test_size` images, then the validation share of
    the first is held out, unless the data have validation images of their own (all with a fixed
    seed); at last labels of the remaining training images are made noisy, or random, with `seed`.
    A data set without a test split gives up a fixed stratified 20 % of its images. Only images that
    are chosen are decoded.

    Args:
        config: Options of the comparison.
        seed: Seed of the label noise.

    Returns:
        Images and labels of the run.

    Raises:
        DataError: If the data cannot be found, decoded, or are fewer than asked for.
    """
    source = _choose_classes(open_source(config), config.classes)
    chosen = _part(source.labels, config.train_size, "train")
    test = _part(source.test_labels, config.test_size, "test")
    test_images, test_labels = source.test_images[test], source.test_labels[test]
    if source.val_images is not None and source.val_labels is not None:
        train, val_images, val_labels = chosen, source.val_images, source.val_labels
    else:
        share = HELD_OUT if config.validation is None else config.validation
        val, train = stratified(source.labels, chosen, round(share * len(chosen)))
        if not len(val) or not len(train):
            raise DataError(
                f"validation={share} of {len(chosen)} images leaves {len(train)} images to train "
                f"on and {len(val)} to validate on: both must be at least 1."
            )
        val_images, val_labels = source.images[val], source.labels[val]
    images: list[Images] = [source.images[train], val_images, test_images]
    stored = images[0] if isinstance(images[0], StoredImages) else None
    sizes = None
    if not config.streaming:
        images[:], sizes = decode_all(config.data, images)
    clean = source.labels[train]
    classes = len(source.class_names)
    similar = _most_similar(images[0], clean, classes) if _asymmetric(config) else None
    given = _given_labels(config, clean, similar, classes, seed)
    if config.noisy_validation:
        val_labels = _with_noise(config, val_labels, similar, classes, seed, "validation noise")
    planted = plant(given, classes, share=config.plant, seed=seed) if config.plant else None
    return ImageData(
        train_images=images[0],
        train_labels=given if planted is None else planted.labels,
        train_clean_labels=clean,
        val_images=images[1],
        val_labels=val_labels,
        test_images=images[2],
        test_labels=test_labels,
        class_names=source.class_names,
        found=_in_words(source, [clean, val_labels, test_labels], images[0], sizes),
        planted=planted,
        stored=stored,
    )


def _part(labels: Tensor, size: int | None, part: str) -> Tensor:
    """Places of the images of a split that are used."""
    available = len(labels)
    if size is not None and size > available:
        kind = {"train": "training"}.get(part, part)
        raise DataError(f"{part}_size={size} is more than the {available} {kind} images.")
    return stratified(labels, torch.arange(available), available if size is None else size)[0]


def _in_words(source: Source, labels: list[Tensor], images: Images, sizes: Sizes | None) -> str:
    """How many images there are for what, of which classes and sizes."""
    train, val, test = map(len, labels)
    counts = labels[0].bincount(minlength=len(source.class_names))
    fewest, most = int(counts.min()), int(counts.max())
    each = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    held = "held out of these" if source.val_labels is None else "of the data's own"
    part = "" if (whole := len(source.test_labels)) == test else f" of {whole:,}"
    origin = {
        "test": "",
        "validation": ", the data's validation images, as no others are for tests",
        "train": ", out of a fixed fifth of all, as none are for tests",
    }[source.test_from]
    channels, height, width = images.shape[1:]
    found = "" if sizes is None else _cut_from(sizes, height, width)
    return (
        f"{len(counts)} classes: {train:,} images to train on ({each} a class), {val:,} {held} to "
        f"validate on, {test:,}{part} to test on{origin}. Each is {height} x {width} pixels, "
        f"{'grey' if channels == 1 else 'in colour'}{found}."
    )


def _cut_from(sizes: Sizes, height: int, width: int) -> str:
    smallest, largest = (f"{sizes[i]} x {sizes[i + 1]}" for i in (0, 2))
    if smallest == largest:
        return "" if smallest == f"{height} x {width}" else f", cut from {smallest}"
    return f", cut from {smallest} to {largest}"


def _choose_classes(source: Source, classes: int | None) -> Source:
    available = len(source.class_names)
    if classes is None:
        return source
    if classes > available:
        raise DataError(f"classes={classes} is more than the {available} classes of the data.")
    order = torch.randperm(available, generator=torch.Generator().manual_seed(SPLIT_SEED))
    chosen = order[:classes].sort().values
    new_label = torch.full((available,), -1).scatter(0, chosen, torch.arange(classes))
    changed: dict[str, Any] = {}
    for part in ("", "test_", "val_"):
        images, labels = getattr(source, f"{part}images"), getattr(source, f"{part}labels")
        if images is not None:
            kept = new_label[labels] >= 0
            changed |= {f"{part}images": images[kept], f"{part}labels": new_label[labels[kept]]}
    names = tuple(source.class_names[label] for label in chosen.tolist())
    return replace(source, class_names=names, **changed)


def _asymmetric(config: Comparison) -> bool:
    return config.noise == "asymmetric" and config.label_noise > 0


def _given_labels(
    config: Comparison, clean: Tensor, similar: Tensor | None, classes: int, seed: int
) -> Tensor:
    if config.labels == "random":
        generator = seeded_generator(seed, "random labels")
        return torch.randint(classes, clean.shape, generator=generator)
    return _with_noise(config, clean, similar, classes, seed, "label noise")


def _with_noise(
    config: Comparison,
    labels: Tensor,
    similar: Tensor | None,
    classes: int,
    seed: int,
    drawn: str,
) -> Tensor:
    """Labels of which a share is wrong: the similar class if there is one for each, or any."""
    count = round(config.label_noise * len(labels))
    if count and classes < 2:
        raise DataError("label_noise needs at least 2 classes.")
    if not count:
        return labels.clone()
    generator = seeded_generator(seed, drawn)
    noisy = torch.randperm(len(labels), generator=generator)[:count]
    if similar is not None:
        return labels.scatter(0, noisy, similar[labels[noisy]])
    # An offset of 1 to K - 1 makes each of the other classes equally likely.
    offset = torch.randint(1, classes, (count,), generator=generator)
    return labels.scatter(0, noisy, (labels[noisy] + offset) % classes)


def _most_similar(images: Images, labels: Tensor, classes: int) -> Tensor:
    """For each class, the other one whose mean image is nearest."""
    pixels = in_memory(images).flatten(1)
    means = torch.stack(
        [pixels[labels == label].double().mean(0).nan_to_num(torch.inf) for label in range(classes)]
    )
    distances = torch.cdist(means, means).nan_to_num(torch.inf).fill_diagonal_(torch.inf)
    return distances.argmin(1)
