"""A seeded random part of any data, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset, Subset

from gradmask.containers import part


def random_samples(loader: Iterable[Any], count: int, seed: int) -> Iterator[Any]:
    """Yield batches with `count` samples drawn without replacement (all, if there are fewer).

    A `DataLoader` over a map-style dataset reads only the drawn samples. Any other iterable is
    read to its end; the drawn samples come in batches as large as its own.

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
    bound, size = 2.0, 1
    for batch in loader:
        n = next((len(t) for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()), 0)
        size = max(size, n)
        keys = torch.rand(n, generator=generator, dtype=torch.float64)
        kept.append(_choose(keys, batch, bound))
        if sum(len(k) for k, _ in kept) > 2 * count:
            bound, kept = _smallest(kept, count)
    if sum(len(k) for k, _ in kept) > count:
        _, kept = _smallest(kept, count)
    for batch in _merged([batch for keys, batch in kept if len(keys)]):
        n = next(len(t) for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim())
        for start in range(0, n, size):
            yield part(batch, slice(start, start + size))


def _smallest(kept: list[tuple[Tensor, Any]], count: int) -> tuple[float, list[tuple[Tensor, Any]]]:
    bound = float(torch.cat([k for k, _ in kept]).kthvalue(count).values)
    return bound, [_choose(k, b, bound) for k, b in kept]


def _choose(keys: Tensor, batch: Any, bound: float) -> tuple[Tensor, Any]:
    chosen = (keys <= bound).nonzero().flatten()
    if len(chosen) == len(keys):
        return keys, part(batch, slice(None))
    pick = lambda t: t[chosen.to(t.device)] if isinstance(t, Tensor) and t.dim() else t  # noqa: E731
    return keys[chosen], tree_map(pick, batch)


def _merged(batches: list[Any]) -> Iterator[Any]:
    """Join batches whose tensors fit together; a few samples at a time would be slow to measure."""
    groups: dict[Any, list[Any]] = {}
    for batch in batches:
        leaves, form = tree_flatten(batch)
        kinds = [
            (t.shape[1:], t.dtype, t.device) if isinstance(t, Tensor) and t.dim() else repr(t)
            for t in leaves
        ]
        groups.setdefault((str(form), str(kinds)), []).append(batch)
    for group in groups.values():
        join = lambda *ts: torch.cat(ts) if isinstance(ts[0], Tensor) and ts[0].dim() else ts[0]  # noqa: E731
        yield tree_map(join, *group)
