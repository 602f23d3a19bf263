"""Numbers the samples of a loader that exists already, unseen by its dataset and collating."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from gradmask.errors import DataError

KEY = "gradmask_sample_id"


class NumberedSamples(Dataset[Any]):
    """Pairs of a sample, just as the data set gives it, and its number.

    Args:
        dataset: The data set.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):  # while it is copied to a worker
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: Any) -> tuple[Any, int]:
        """A sample and its number."""
        return self.dataset[index], int(index)

    def __getitems__(self, indices: list[Any]) -> list[tuple[Any, int]]:
        """Several at once, read as they would be without their numbers."""
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = fetch(indices) if fetch else [self.dataset[index] for index in indices]
        return [(sample, int(index)) for sample, index in zip(samples, indices, strict=True)]


class NumberedCollating:
    """Collates samples as ever, and adds their numbers to the batch, a mapping.

    Args:
        collate: What collates.
    """

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, pairs: list[tuple[Any, int]]) -> Any:
        """The batch of these samples."""
        batch = self.collate([sample for sample, _ in pairs])
        batch[KEY] = torch.tensor([index for _, index in pairs], device="cpu")
        return batch


def number(loader: Any) -> int:
    """Have a loader's batches come with the numbers of their samples, under `KEY`.

    Args:
        loader: A `DataLoader`, or Accelerate's around one; it is changed.

    Returns:
        The number of samples.

    Raises:
        DataError: If its samples have no indices to number.
    """
    inner = _inner(loader)
    if hasattr(inner, "dataset"):
        check_indices(inner.dataset)
    if getattr(inner, "batch_sampler", None) is None or not hasattr(inner, "collate_fn"):
        raise DataError(
            f"The training loader (a {type(inner).__name__}) does not put batches together of "
            "single samples, so these have no numbers: use a DataLoader with a batch size."
        )
    if not isinstance(inner.dataset, NumberedSamples):
        _set(inner, NumberedSamples(inner.dataset), NumberedCollating(inner.collate_fn))
    return len(inner.dataset)


def restore(loader: Any) -> None:
    """Undo `number`.

    Args:
        loader: The loader.
    """
    inner = _inner(loader)
    if isinstance(getattr(inner, "dataset", None), NumberedSamples):
        _set(inner, inner.dataset.dataset, inner.collate_fn.collate)


@contextmanager
def unnumbered(loader: Any) -> Iterator[None]:
    """Have a loader as it was, to make another one by it.

    Args:
        loader: The loader, numbered or not.
    """
    inner = _inner(loader)
    numbered = isinstance(getattr(inner, "dataset", None), NumberedSamples)
    restore(loader)
    try:
        yield
    finally:
        if numbered:
            number(loader)


def check_indices(dataset: Any) -> None:
    """Raise an error unless the samples of a data set have indices.

    Args:
        dataset: The data set.

    Raises:
        DataError: If they have none.
    """
    no_indices = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
    if no_indices or not hasattr(dataset, "__len__"):
        raise DataError(
            f"The training data ({type(dataset).__name__}) have no indices to number the samples "
            "by (__len__ and __getitem__), and an audit needs to know each one again: use a "
            "map-style data set."
        )


def _inner(loader: Any) -> Any:
    return getattr(loader, "base_dataloader", loader)


def _set(inner: Any, dataset: Any, collate: Any) -> None:
    inner.collate_fn = collate
    vars(inner)["dataset"] = dataset  # which a DataLoader does not let be set: its sampler is of it
