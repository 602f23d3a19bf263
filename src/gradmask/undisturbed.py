"""What reading a loader must not change in a training that reads from it too."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_INNER = ("sampler", "batch_sampler")


@contextmanager
def undisturbed(loader: Iterable[Any]) -> Iterator[Iterable[Any]]:
    """Read a loader, in the middle of an epoch too, so that training goes on as without it.

    Python's and NumPy's random states are put back, and of a `DataLoader` its generators, what its
    samplers count, and the workers that it keeps. (The random state of PyTorch is put back where
    the model is measured.)

    Args:
        loader: What training reads from.

    Yields:
        What to read instead. Of Accelerate's it is the loader inside: the outer one counts epochs,
        and tells the accelerator to step when its last batch comes.
    """
    loader = getattr(loader, "base_dataloader", loader)
    back = list(_random_states())
    parts = list(_parts(loader)) if hasattr(loader, "batch_sampler") else []
    for part in parts:
        back += [_attributes(part), *map(_generator, vars(part).values())]
    if getattr(loader, "_iterator", None) is not None:  # workers that are in an epoch
        vars(loader)["_iterator"] = None
    try:
        yield loader
    finally:
        for put_back in back:
            put_back()


def _parts(loader: Any) -> Iterator[Any]:
    """The loader, its samplers, and those inside them; each once."""
    seen: set[int] = set()
    waiting = [loader]
    while waiting:
        part = waiting.pop()
        if hasattr(part, "__dict__") and id(part) not in seen:
            seen.add(id(part))
            yield part
            waiting += [vars(part)[name] for name in _INNER if name in vars(part)]


def _random_states() -> Iterator[Callable[[], Any]]:
    state = random.getstate()
    yield lambda: random.setstate(state)
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"].random
        drawn = numpy.get_state()
        yield lambda: numpy.set_state(drawn)


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
