"""Independent seeds from a few integers, and random states that are put back."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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


def seed_everything(seed: int) -> None:
    """Seed PyTorch, Python and, if it is imported, NumPy."""
    torch.manual_seed(derive_seed(seed, "torch"))
    random.seed(derive_seed(seed, "python"))
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(derive_seed(seed, "numpy"))


def random_states() -> dict[str, Any]:
    """Random states of PyTorch, Python and NumPy, as values that load without pickle."""
    found: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        found["numpy"] = (name, torch.from_numpy(keys.astype("int64")), *rest)
    return found


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put back what `random_states` returned."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    if "numpy" in states and "numpy" in sys.modules:
        name, keys, *rest = states["numpy"]
        sys.modules["numpy"].random.set_state((name, keys.numpy().astype("uint32"), *rest))


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
