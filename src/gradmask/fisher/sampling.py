"""A seeded random part of any data, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset, Subset

from gradmask.fisher.likelihood import part


def random_samples(loader: Iterable[Any], count: int, seed: int) -> Iterator[Any]:
    """Yield batches with `count` samples drawn without replacement (all, if there are fewer).

    A `DataLoader` over a map-style dataset reads only the drawn samples. Any other iterable is
    read to its end; the batches are of the sizes it gave, with the drawn samples only.

    Args:
        loader: Iterable of batches.
        count: Samples to draw.
        seed: Seed of the draw.

    Yields:
        Batches of the same form.
    """
    generator = torch.Generator().manual_seed(seed)
    if (
        isinstance(loader, DataLoader)
        and loader.batch_size is not None
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader.sampler).__module__.startswith("torch.utils.data")
    ):
        # The sampler may leave samples out (a validation part). Its order must not matter.
        available = sorted(loader.sampler)
        chosen = torch.randperm(len(available), generator=generator)[:count].sort().values.tolist()
        yield from DataLoader(
            Subset(loader.dataset, [available[i] for i in chosen]),
            batch_size=loader.batch_size,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=generator,
        )
        return
    # Keep the `count` samples with the smallest random keys: one reading, bounded memory.
    kept: list[tuple[Tensor, Any]] = []
    bound = 2.0
    for batch in loader:
        size = next((len(t) for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()), 0)
        keys = torch.rand(size, generator=generator, dtype=torch.float64)
        kept.append(_choose(keys, batch, bound))
        if sum(len(k) for k, _ in kept) > count:
            keys = torch.cat([k for k, _ in kept])
            bound = float(keys.kthvalue(count).values)
            kept = [_choose(k, b, bound) for k, b in kept]
    for keys, batch in kept:
        if len(keys):
            yield batch


def _choose(keys: Tensor, batch: Any, bound: float) -> tuple[Tensor, Any]:
    chosen = (keys <= bound).nonzero().flatten()
    if len(chosen) == len(keys):
        return keys, part(batch, slice(None))
    pick = lambda t: t[chosen.to(t.device)] if isinstance(t, Tensor) and t.dim() else t  # noqa: E731
    return keys[chosen], tree_map(pick, batch)
