"""A seeded random part of any data, in batches."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from gradmask.containers import map_tensors, part, sample_count
from gradmask.loaders import loader_over

logger = logging.getLogger("gradmask")

# A loader that must be read in order is read until it has given so many times what is wanted.
WINDOW = 4
_SAMPLERS = (
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)


def random_samples(loader: Iterable[Any], count: int, seed: int) -> Iterator[Any]:
    """Yield batches with `count` samples drawn without replacement (all, if there are fewer).

    A plain `DataLoader` over a map-style dataset reads only the drawn samples. Any other iterable
    (a subclass of it too) is read in order, at most `WINDOW * count` samples of it, and what is
    drawn stays in the batches in which it came, in their order.

    Args:
        loader: Iterable of batches.
        count: Samples to draw.
        seed: Seed of the draw.

    Yields:
        Batches of the same form.

    Raises:
        DataError: If a batch holds tensors with different numbers of samples.
    """
    generator = torch.Generator().manual_seed(seed)
    if _is_plain(loader):
        yield from _rebuilt(loader, count, generator)
    else:
        yield from _in_order(loader, count, generator)


def _is_plain(loader: Any) -> TypeGuard[DataLoader[Any]]:
    """Whether it is certain how the loader makes batches of a dataset's samples."""
    return (
        type(loader) is DataLoader
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader.batch_sampler) is BatchSampler
        and type(loader.batch_sampler.sampler) in _SAMPLERS
    )


def _rebuilt(loader: DataLoader[Any], count: int, generator: torch.Generator) -> Iterator[Any]:
    """Read the drawn samples alone."""
    batches: Any = loader.batch_sampler  # may be the user's own, beside which `sampler` is not read
    # The sampler may leave samples out (a validation part). Its order must not matter.
    available = sorted(batches.sampler)
    chosen = (
        torch.randperm(len(available), generator=generator, device="cpu")[:count]
        .sort()
        .values.tolist()
    )
    indices = [available[i] for i in chosen]
    yield from loader_over(loader, indices, batches.batch_size, generator)


def _in_order(loader: Iterable[Any], count: int, generator: torch.Generator) -> Iterator[Any]:
    """Keep the `count` samples with the smallest random keys: one reading, bounded memory."""
    kept: list[tuple[Tensor, Any]] = []
    bound, read = 2.0, 0
    for batch in loader:
        if read >= WINDOW * count:
            logger.warning(
                "max_samples: %d samples were drawn at random from the first %d that the %s gave; "
                "the rest was not read. If its order is not random, shuffle it.",
                *(count, read, type(loader).__name__),
            )
            break
        n = sample_count(batch)
        read += n
        keys = torch.rand(n, generator=generator, dtype=torch.float64, device="cpu")
        kept.append(_choose(keys, batch, bound))
        if sum(len(k) for k, _ in kept) > 2 * count:
            bound, kept = _smallest(kept, count)
    if sum(len(k) for k, _ in kept) > count:
        _, kept = _smallest(kept, count)
    yield from (batch for keys, batch in kept if len(keys))


def _smallest(kept: list[tuple[Tensor, Any]], count: int) -> tuple[float, list[tuple[Tensor, Any]]]:
    bound = float(torch.cat([k for k, _ in kept]).kthvalue(count).values)
    return bound, [_choose(k, b, bound) for k, b in kept]


def _choose(keys: Tensor, batch: Any, bound: float) -> tuple[Tensor, Any]:
    chosen = (keys <= bound).nonzero().flatten()
    if len(chosen) == len(keys):
        return keys, part(batch, slice(None))
    return keys[chosen], map_tensors(lambda t: t[chosen.to(t.device)] if t.dim() else t, batch)
