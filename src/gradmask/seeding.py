"""Independent seeds from a few integers, and random states that are put back."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(*numbers: int | str) -> int:
    """A seed of its own for every tuple of numbers and names.

    PyTorch's CPU generator reads only the low 32 bits of a seed, and neighbouring sums such as
    seed + epoch coincide between runs, so the tuple is hashed.

    Args:
        numbers: For example a run's seed, a purpose and an epoch.

    Returns:
        Integer in [0, 2³²).
    """
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def seeded_generator(*numbers: int | str) -> torch.Generator:
    """A CPU generator seeded with `derive_seed(*numbers)`."""
    return torch.Generator().manual_seed(derive_seed(*numbers))


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put back the random states of Python and, if it is imported, of NumPy."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    drawn = numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(drawn)


@contextmanager
def own_random_state(*numbers: int | str) -> Iterator[None]:
    """Draw from a random state of its own; PyTorch's, NumPy's and Python's stay.

    Args:
        numbers: What it is seeded with, as in `derive_seed`.
    """
    seed, numpy = derive_seed(*numbers), sys.modules.get("numpy")
    with random_states_kept(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        if numpy:
            numpy.random.seed(seed)
        yield
