"""Training data read once more, by the side of a host that trains on them."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Subset

from gradmask.errors import DataError
from gradmask.seeding import derive_seed


def another_loader(
    loader: Any, batch_size: int, *, rank: int = 0, ranks: int = 1, give: str = "data"
) -> DataLoader[Any]:
    """A loader of a rank's own samples, collated as a host's loader does, in a fixed order.

    The host's own may not be read within its epoch: that would move its sampler, and end it.

    Args:
        loader: The host's.
        batch_size: Samples in a batch.
        rank: This process.
        ranks: Number of processes, each of which reads its own samples.
        give: What the user gives in place of data that cannot be read twice.

    Returns:
        The loader.

    Raises:
        DataError: If the data have no order.
    """
    dataset: Any = getattr(loader, "dataset", None)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise DataError(
            f"The training data ({type(dataset).__name__}) cannot be read again while they are "
            f"trained on: give {give}=loader of batches to measure on."
        )
    try:
        collate = copy.deepcopy(loader.collate_fn)  # may have a generator of its own
    except Exception:  # of whatever it holds
        collate = loader.collate_fn
    return DataLoader(
        Subset(dataset, range(rank, len(dataset), ranks)),
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


@contextmanager
def own_random_state(*seed: int | str) -> Iterator[None]:
    """Let data draw from a random state of its own; PyTorch's, NumPy's and Python's stay.

    Args:
        seed: What it is seeded with.
    """
    own, python = derive_seed("reading", *seed), random.getstate()
    numpy = sys.modules.get("numpy")
    kept = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(own)
            random.seed(own)
            if numpy:
                numpy.random.seed(own)
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(kept)
