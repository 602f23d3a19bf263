"""Loaders read by the side of a training that reads from them too."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from gradmask.seeding import random_states_kept

_INNER = ("sampler", "batch_sampler", "collate_fn")


@contextmanager
def undisturbed(loader: Iterable[Any]) -> Iterator[Iterable[Any]]:
    """Read a loader, in the middle of an epoch too, so that training goes on as without it.

    Python's and NumPy's random states are put back, and of a `DataLoader` its generators, those
    that its dataset and collating hold, what its samplers count, and the workers that it keeps.
    (The random state of PyTorch is put back where the model is measured.)

    Args:
        loader: What training reads from.

    Yields:
        What to read instead. Of Accelerate's it is the loader inside: the outer one counts epochs,
        and tells the accelerator to step when its last batch comes.
    """
    inner: Any = getattr(loader, "base_dataloader", loader)
    back: list[Callable[[], Any]] = []
    if hasattr(inner, "batch_sampler"):
        for part in _parts(inner, _INNER):
            back += [_attributes(part), *map(_generator, vars(part).values())]
        for dataset in _parts(inner.dataset, ("dataset",)):  # what it caches stays
            back += map(_generator, vars(dataset).values())
    if getattr(inner, "_iterator", None) is not None:  # workers that are in an epoch
        vars(inner)["_iterator"] = None
    with random_states_kept():
        try:
            yield inner
        finally:
            for put_back in back:
                put_back()


def loader_over(
    loader: DataLoader[Any],
    indices: Sequence[int],
    batch_size: int,
    generator: torch.Generator | None = None,
) -> DataLoader[Any]:
    """A loader that reads some of another's samples, in this order, and leaves that one alone.

    Args:
        loader: The other.
        indices: Of the samples in its dataset.
        batch_size: Samples in a batch.
        generator: What seeds its workers.

    Returns:
        The loader.
    """
    try:
        collate = copy.deepcopy(loader.collate_fn)  # may have a generator of its own
    except Exception:  # of whatever it holds
        collate = loader.collate_fn
    if generator is not None:  # PyTorch draws the workers' seed on the default device
        seed = generator.initial_seed()
        generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return DataLoader(
        Subset(loader.dataset, indices),
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=generator,
    )


def _parts(whole: Any, names: Iterable[str]) -> Iterator[Any]:
    """An object and those inside it by these names; each once."""
    seen: set[int] = set()
    waiting = [whole]
    while waiting:
        part = waiting.pop()
        if hasattr(part, "__dict__") and id(part) not in seen:
            seen.add(id(part))
            yield part
            waiting += [vars(part)[name] for name in names if name in vars(part)]


def _attributes(part: Any) -> Callable[[], Any]:
    before = dict(vars(part))
    return lambda: vars(part).update(before)


def _generator(value: Any) -> Callable[[], Any]:
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, random.Random):
        own = value.getstate()
        return lambda: value.setstate(own)
    if hasattr(value, "bit_generator"):  # NumPy's
        bits, drawn = value.bit_generator, copy.deepcopy(value.bit_generator.state)
        return lambda: setattr(bits, "state", drawn)
    return lambda: None
