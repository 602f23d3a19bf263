"""Independent seeds from a few integers."""

from __future__ import annotations

import hashlib

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
