"""Batches of images: for training, in random order and augmented; for measuring, as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gradmask.recipes.config import Comparison
from gradmask.recipes.data.images import ImageData
from gradmask.recipes.data.sources import Images
from gradmask.recipes.data.stored import Key, Labelled, StoredImages, View, decoded
from gradmask.recipes.data.transforms import augment_batch, transform_of
from gradmask.seeding import derive_seed
from gradmask.study.world import ALONE, World

Prepare = Callable[[Tensor], Tensor]
EVALUATION_BATCH = 1024  # at most
# Pixels of a channel in a batch, at most. A layer of 64 channels then has 32 MiB on a CPU: what is
# larger malloc asks the system for each time, whose page faults take as long as the work.
EVALUATION_PIXELS = {"cpu": 1 << 17, "cuda": 1 << 24}


@dataclass(frozen=True)
class Batches:
    """Images and labels as they are measured: in order, without augmentation.

    Attributes:
        images: uint8 images, NCHW.
        labels: Their labels.
        prepare: Turns uint8 images into the network's inputs.
        size: Images in a batch (default: as many as take little memory).
        world: Of every batch, the images of this process among those that measure together.
    """

    images: Images
    labels: Tensor
    prepare: Prepare
    size: int | None = None
    world: World = ALONE

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `(inputs, labels)` batches; the last may be smaller."""
        size = self.batch_size
        labels = [self.world.part(part) for part in self.labels.split(size)]
        for images, part in zip(self._images(size), labels, strict=True):
            yield self.prepare(images), part

    @property
    def batch_size(self) -> int:
        """Images in a batch."""
        most = EVALUATION_PIXELS.get(self.labels.device.type, EVALUATION_PIXELS["cuda"])
        return self.size or min(EVALUATION_BATCH, max(4, most // self.images.shape[2:].numel()))

    def _images(self, size: int) -> Iterator[Tensor]:
        if not isinstance(self.images, StoredImages):
            yield from (self.world.part(batch) for batch in self.images.split(size))
            return
        indices = torch.arange(len(self.images)).split(size)
        keys: Iterable[list[Key]] = (
            [(i, None) for i in self.world.part(p).tolist()] for p in indices
        )
        for images in decoded(self.images, keys, self.labels.is_cuda):
            yield images.to(self.labels.device, non_blocking=True)


class InMemory(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory with their labels, for a `DataLoader` that reads a part of them.

    Args:
        images: The images.
        labels: Their labels, on the same device.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch, which nothing need collate."""
        chosen = torch.tensor(indices, device=self.labels.device)
        return self.images[chosen], self.labels[chosen]


def fisher_batches(batches: Batches) -> DataLoader[Any]:
    """Images for a Fisher pass, of which a random part may be all that is read.

    Args:
        batches: The images.

    Returns:
        A loader over this process's part of them.
    """
    mine = slice(batches.world.rank, None, batches.world.size)
    images, labels = batches.images[mine], batches.labels[mine]
    dataset: Dataset[tuple[Tensor, Tensor]]
    if isinstance(images, StoredImages):
        dataset, workers = Labelled(images, labels.cpu()), images.workers
    else:
        dataset, workers = InMemory(images, labels), 0
    return DataLoader(
        dataset,
        batch_size=batches.batch_size,
        num_workers=workers,
        generator=torch.Generator(),
        collate_fn=partial(_prepared, batches.prepare),
    )


def _prepared(prepare: Prepare, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return prepare(batch[0]), batch[1]


def training_batches(
    config: Comparison,
    data: ImageData,
    batches: Sequence[Tensor],
    augmentation: torch.Generator,
    crops: tuple[int | str, ...],
    prepare: Prepare,
    world: World,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's part of each training batch, augmented.

    Random numbers are those of the whole batch, whatever the number of processes. Those of a
    stored image depend on `crops` and its index alone, so that workers may run ahead.

    Args:
        config: Options of the comparison.
        data: The images.
        batches: Places of each batch's images, on the CPU.
        augmentation: Random numbers for images in memory.
        crops: Seed of this epoch's random crops of stored images.
        prepare: Turns uint8 images into the network's inputs.
        world: This process among those that train.

    Yields:
        Inputs and labels.
    """
    images, device = data.train_images, data.train_labels.device
    # To the device all at once: a copy in each step would have to be waited for.
    indices = torch.cat(list(batches)).to(device).split([len(batch) for batch in batches])
    if isinstance(images, StoredImages):
        keys = (
            [(i, derive_seed(*crops, i) if config.augment else None) for i in part]
            for part in (world.part(batch).tolist() for batch in batches)
        )
        view = View(config.crop, config.flip, transform_of(config))
        stored = decoded(images, keys, device.type == "cuda", view)
        for batch, found in zip(indices, stored, strict=True):
            yield (
                prepare(found.to(device, non_blocking=True)),
                data.train_labels[world.part(batch)],
            )
        return
    for batch in indices:
        augmented = augment_batch(config, images[batch], augmentation)
        yield prepare(world.part(augmented)), data.train_labels[world.part(batch)]
