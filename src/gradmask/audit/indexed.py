"""A data set that yields the number of each sample as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from gradmask.errors import DataError, OptionError

ID = "sample_id"


class Indexed(Dataset[Any]):
    """A map-style data set whose samples come with their number.

    A sample that is a tuple or list gets it as its last entry, a mapping as `sample_id`, anything
    else becomes a pair; collated as ever, they are the batch's `ids` for `Dynamics.update`. The
    numbers are those of this data set, however a loader shuffles, shards or subsets it.

    Args:
        dataset: The data set, with a length.
        key: Name of the number in samples that are mappings.

    Raises:
        DataError: If the data set has no indices to number.
    """

    def __init__(self, dataset: Any, key: str = ID) -> None:
        no_indices = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
        if no_indices or not hasattr(dataset, "__len__"):
            raise DataError(
                f"A {type(dataset).__name__} has no indices to number its samples by (__len__ and "
                "__getitem__): let it yield a number of its own with each sample, from 0 on."
            )
        self.dataset, self.key = dataset, key

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """A sample and its number."""
        index = int(index)
        index = index + len(self) if index < 0 else index
        return self._with_id(self.dataset[index], index)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Several at once, in one call where the data set has one for that."""
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = fetch(indices) if fetch else [self.dataset[index] for index in indices]
        return [self._with_id(sample, int(p)) for sample, p in zip(samples, indices, strict=True)]

    def _with_id(self, sample: Any, index: int) -> Any:
        if isinstance(sample, Mapping):
            if self.key in sample:
                raise OptionError(f"The samples have a {self.key!r}: give Indexed another key.")
            return {**sample, self.key: index}
        if isinstance(sample, tuple | list):
            return (*sample, index)
        return sample, index
