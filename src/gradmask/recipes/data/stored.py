"""Images that stay where they are stored and are decoded by workers as they are needed."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from gradmask.errors import DataError
from gradmask.recipes.data.decoding import decode, middle
from gradmask.recipes.data.own import Transform

MOST_WORKERS = 8  # by default
Key = tuple[int, int | None]  # index of an image, and the seed of its random crop


@dataclass(frozen=True)
class StoredImages:
    """Images of a data set, each a file or bytes in it; indexed as a tensor (N, 3, size, size).

    Attributes:
        rows: The data set, with a column of undecoded images.
        column: That column.
        where: Name of the data set and split, for messages.
        indices: Rows of the images, int64.
        size: Height and width they are cut to; 0 to leave them as they are, for `open` alone.
        workers: Processes that decode; 0 for none but this one.
    """

    rows: Any
    column: str
    where: str
    indices: Tensor
    size: int
    workers: int

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, chosen: Any) -> StoredImages:
        chosen = chosen.cpu() if isinstance(chosen, Tensor) else chosen
        return replace(self, indices=self.indices[chosen])

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor they stand for."""
        return torch.Size((len(self), 3, self.size, self.size))

    def open(self, index: int) -> Image.Image:
        """Decode one image in its own size, grey (L) or RGB.

        Args:
            index: Its index among these images.

        Returns:
            The image.

        Raises:
            DataError: If it is damaged; names the file, or its row in the data set.
        """
        stored = self._stored(index)
        try:
            return decode(
                stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])
            )
        except Exception as error:  # Pillow raises whatever the bytes lead it to
            raise DataError(
                f"Cannot decode {self.name(index)}: {str(error) or type(error).__name__}. Mend "
                "it, or leave damaged images out with --skip_damaged true."
            ) from error

    def name(self, index: int) -> str:
        """What to call an image in a message: its file, or its row in the data set."""
        path = (self._stored(index) or {}).get("path")
        known = path and os.path.exists(path)
        return str(path) if known else f"image {int(self.indices[index])} of {self.where}"

    def names(self) -> list[str]:
        """What to call each image in a table: its file, or its row in the data set."""
        import pyarrow.compute

        paths = pyarrow.compute.struct_field(self.rows.data[self.column], "path")
        found = paths.take(pyarrow.array(self.indices.numpy())).to_pylist()
        named = zip(found, self.indices.tolist(), strict=True)
        return [path or f"image {row} of {self.where}" for path, row in named]

    def _stored(self, index: int) -> Any:
        row = int(self.indices[index])
        return self.rows.data[self.column][row].as_py()  # as `rows[row]`, without its overhead

    def centre(self, index: int) -> Tensor:
        """The middle of one image, for measuring: uint8 (3, size, size)."""
        return _to_tensor(middle(self.open(index), self.size))

    def cropped(self, index: int, seed: int, crop: bool = True, flip: bool = True) -> Tensor:
        """A random part of one image, mirrored or not, for training: uint8 (3, size, size)."""
        image = self.open(index)
        if not crop:
            image = middle(image, self.size)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # this one only: `torch.manual_seed` is slow
            return _to_tensor(_random_part(self.size if crop else None, flip)(image))

    def whole(self, index: int) -> Tensor:
        """One image in its own size: uint8 (3, height, width)."""
        return _to_tensor(self.open(index))


@lru_cache
def _random_part(size: int | None, flip: bool) -> v2.Transform:
    parts = [] if size is None else [v2.RandomResizedCrop(size)]
    return v2.Compose([*parts, v2.RandomHorizontalFlip() if flip else v2.Identity()])


def _to_tensor(image: Image.Image) -> Tensor:
    tensor: Tensor = transforms.pil_to_tensor(image.convert("RGB"))
    return tensor


def default_workers() -> int:
    """As many as there are processors for this process, up to eight."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return min(MOST_WORKERS, len(affinity(0)) if affinity else os.cpu_count() or 1)


class _Views(Dataset[Any]):
    """What the workers make of an image."""

    def __init__(self, images: StoredImages, make: Callable[[StoredImages, Key], Any]) -> None:
        self.images, self.make = images, make

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> Any:
        return self.make(self.images, key)


@dataclass(frozen=True)
class View:
    """What is made of a stored image.

    Attributes:
        crop: Take a random part in training, or else the middle.
        flip: Mirror half of the images in training.
        transform: What is done in place of both.
    """

    crop: bool = True
    flip: bool = True
    transform: Transform | None = None

    def __call__(self, images: StoredImages, key: Key) -> Tensor:
        """The view of one image; without a seed its middle."""
        index, seed = key
        if seed is None:
            return images.centre(index)
        if self.transform is not None:
            return self.transform(images.whole(index), seed, images.size)
        return images.cropped(index, seed, self.crop, self.flip)


def _damage(images: StoredImages, key: Key) -> str:
    try:
        images.open(key[0])
    except DataError as error:
        return str(error)
    return ""


def _as_list(views: list[Any]) -> list[Any]:
    return views


def _in_workers(
    images: StoredImages, make: Callable[[StoredImages, Key], Any], **options: Any
) -> Iterator[Any]:
    loader = DataLoader(
        _Views(images, make),
        num_workers=images.workers,
        generator=torch.Generator(),  # or it draws from the one of dropout, once for each loader
        **options,
    )
    with worker_errors():
        try:
            batches = iter(loader)
        except OSError as error:
            raise _lost(error) from error
        yield from batches


def _lost(error: Exception) -> DataError:
    return DataError(
        f"A process that decodes images was lost or cannot start ({error}). It may be out of "
        "memory or shared memory: try fewer --workers, or 0 to decode without any."
    )


@contextmanager
def worker_errors() -> Iterator[None]:
    """Give errors of a `DataLoader`'s workers as this process would: no trace back, and a mend.

    Raises:
        DataError: A worker's own, by its message alone; or if a worker was lost.
    """
    try:
        yield
    except DataError as error:
        _, caught, text = str(error).rpartition(f"{DataError.__module__}.DataError: ")
        if not caught:
            raise
        raise DataError(text.strip()) from error
    except RuntimeError as error:  # at any moment, not only while a batch is waited for
        if not str(error).startswith("DataLoader worker"):
            raise
        raise _lost(error) from error


def decoded(
    images: StoredImages, batches: Iterable[list[Key]], pin: bool, view: View | None = None
) -> Iterator[Tensor]:
    """Decode batches of images in the workers.

    Args:
        images: The images.
        batches: Which ones; with a seed a random crop, without one the middle.
        pin: Put them where a GPU can fetch them while it computes.
        view: What is made of those with a seed (default: a random crop, mirrored or not).

    Yields:
        uint8 images (N, 3, size, size).

    Raises:
        DataError: If an image is damaged, or a worker is lost.
    """
    # Any iterable will do for the sampler.
    return _in_workers(images, view or View(), batch_sampler=batches, pin_memory=pin)


def damaged(images: StoredImages) -> Iterator[tuple[int, str]]:
    """Decode every image once, and find those that are damaged.

    Args:
        images: The images.

    Yields:
        Row and message of each image; none for one that is sound.
    """
    keys: list[Key] = [(index, None) for index in range(len(images))]
    batches = _in_workers(images, _damage, sampler=keys, batch_size=64, collate_fn=_as_list)
    messages = (message for batch in batches for message in batch)
    yield from zip(images.indices.tolist(), messages, strict=True)


class Labelled(Dataset[tuple[Any, Tensor]]):
    """Middles of images with their labels, for a `DataLoader` that reads a part of them.

    Args:
        images: The images.
        labels: Their labels, on the CPU.
    """

    def __init__(self, images: StoredImages, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch, which nothing need collate."""
        return torch.stack([self.images.centre(index) for index in indices]), self.labels[indices]
