"""One exact threshold over many tensors together, and the masks it gives (equation 10)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction

import torch
from torch import Tensor

from gradmask.errors import DataError, GradmaskWarning, OptionError, check_choice, check_keep

STRATEGIES = ("fisher", "random", "random_matched", "inverse")

_DIGIT = 16  # bits settled in each reading of the values
_CHUNK = 1 << 20  # values worked on at a time: bounds the extra memory


def _keys(tensors: list[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Integers in the order of the values: the bits of a non-negative float are such."""
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    for tensor in tensors:
        for chunk in tensor.detach().reshape(-1).split(_CHUNK):
            values = chunk.to(dtype)
            if not bool(((values >= 0) & (values < math.inf)).all()):
                raise DataError(
                    "The Fisher diagonal holds NaN, infinite or negative values: training has "
                    "probably diverged (try a lower learning rate)."
                )
            yield values.add(0.0).view(integer)  # adding 0 turns -0 into 0


def kth_largest(tensors: Iterable[Tensor], k: int) -> Tensor:
    """The k-th largest of all entries of non-negative tensors together, without joining them.

    Counts the values by their leading 16 bits, keeps the bin that holds the k-th, and goes on
    with the next 16 bits: exact, in two readings of float32 values.

    Args:
        tensors: Non-negative tensors of any shapes, dtypes and devices.
        k: Rank, from 1 for the largest.

    Returns:
        Scalar on the CPU, float64 if any tensor is, else float32.

    Raises:
        DataError: If there are no values, or some are NaN, infinite or negative.
    """
    values = [t for t in tensors if t.numel()]
    if not 1 <= k <= sum(t.numel() for t in values):
        raise DataError(f"There is no {k}-th largest of {sum(t.numel() for t in values)} values.")
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in values) else torch.float32
    bits = torch.finfo(dtype).bits
    prefix, remaining = 0, k
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64, device="cpu")
        for keys in _keys(values, dtype):
            if shift + _DIGIT < bits:
                keys = keys[keys >> (shift + _DIGIT) == prefix]
            digits = (keys >> shift) & ((1 << _DIGIT) - 1)
            counts += torch.bincount(digits, minlength=1 << _DIGIT).cpu()
        above = counts.flip(0).cumsum(0)  # values at or above each digit, from the largest
        place = int(torch.searchsorted(above, remaining))
        remaining -= int(above[place - 1]) if place else 0
        prefix = prefix << _DIGIT | ((1 << _DIGIT) - 1 - place)
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    return torch.tensor(prefix, dtype=integer, device="cpu").view(dtype)


def global_threshold(fisher: Mapping[str, Tensor], keep: float) -> Tensor:
    """The value k of equation 10: the ⌈keep · m⌉-th largest of all m diagonal entries together.

    Args:
        fisher: Diagonal of the Fisher information by parameter name.
        keep: Share of the entries at or above the threshold, in (0, 1].

    Returns:
        Scalar on the CPU.

    Raises:
        OptionError: If `keep` is outside (0, 1].
        DataError: If there are no values, or some are NaN, infinite or negative.
    """
    check_keep(keep)
    return kth_largest(fisher.values(), kept_count(fisher, keep))


def kept_count(fisher: Mapping[str, Tensor], keep: float) -> int:
    """⌈keep · m⌉ for m entries in all, with `keep` as it is written: ⌈0.1 · 30⌉ is 3, not 4."""
    return math.ceil(Fraction(str(float(keep))) * sum(t.numel() for t in fisher.values()))


def make_masks(
    fisher: Mapping[str, Tensor],
    keep: float,
    *,
    strategy: str = "fisher",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Masks M of equation 10 (True: the entry still learns), and the controls for it.

    Args:
        fisher: Diagonal of the Fisher information by parameter name.
        keep: Share of the entries that still learn, in (0, 1].
        strategy: `fisher`: M = 1 where a ≥ k (ties at k are kept). `random`: as many entries
            anywhere. `random_matched`: in every tensor as many as `fisher` keeps there, drawn at
            random. `inverse`: as many as `fisher` keeps, the lowest (ties drawn at random).
        generator: CPU generator of the random draws.

    Returns:
        `{name: bool tensor of the same shape and device}`.

    Raises:
        OptionError: If an option is out of range or unknown, or a generator is missing.
        DataError: If values are NaN, infinite or negative (`random` reads only the shapes).
    """
    check_keep(keep)
    check_choice("strategy", strategy, STRATEGIES)
    if strategy != "fisher" and generator is None:
        raise OptionError(f"strategy={strategy!r} draws at random: pass a seeded generator.")
    if strategy == "random":
        total = sum(t.numel() for t in fisher.values())
        return _split(_draw(total, kept_count(fisher, keep), generator), fisher)
    threshold = global_threshold(fisher, keep)
    if float(threshold) == 0.0 and keep < 1.0:
        warnings.warn(
            f"The threshold at keep={keep} is 0: more than {1 - keep:.0%} of the parameters have "
            "no Fisher information, so the mask keeps everything. Measure on more samples, or "
            "look for dead layers.",
            GradmaskWarning,
            stacklevel=2,
        )
    masks = _compare(torch.ge, fisher, threshold)
    if strategy == "random_matched":
        return {
            name: _draw(m.numel(), int(m.sum()), generator).view(m.shape).to(m.device)
            for name, m in masks.items()
        }
    if strategy == "inverse":
        return _lowest(fisher, sum(int(m.sum()) for m in masks.values()), generator)
    return masks


def _compare(
    relation: Callable[[Tensor, Tensor], Tensor], fisher: Mapping[str, Tensor], bound: Tensor
) -> dict[str, Tensor]:
    """Compare in the bound's precision: PyTorch would round the bound to that of each tensor."""
    return {name: relation(a.to(bound.dtype), bound.to(a.device)) for name, a in fisher.items()}


def _draw(total: int, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` of `total` entries, exactly, at random."""
    chosen = torch.zeros(total, dtype=torch.bool, device="cpu")
    chosen[torch.randperm(total, generator=generator, device="cpu")[:count]] = True
    return chosen


def _split(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = flat.split([t.numel() for t in like.values()])
    return {
        name: part.view(t.shape).to(t.device)
        for (name, t), part in zip(like.items(), parts, strict=True)
    }


def _lowest(
    fisher: Mapping[str, Tensor], count: int, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """The `count` smallest entries; zeros are many, so ties are broken at random, exactly."""
    total = sum(t.numel() for t in fisher.values())
    bound = kth_largest(fisher.values(), total - count + 1)
    masks, ties = _compare(torch.lt, fisher, bound), _compare(torch.eq, fisher, bound)
    missing = count - sum(int(m.sum()) for m in masks.values())
    flat = torch.cat([t.reshape(-1).cpu() for t in ties.values()])
    chosen = torch.zeros_like(flat)
    chosen[flat] = _draw(int(flat.sum()), missing, generator)
    return {name: masks[name] | extra for name, extra in _split(chosen, fisher).items()}
