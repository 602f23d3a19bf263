"""One exact threshold over many tensors together, and the masks it gives (equation 10)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from gradmask.errors import DataError, GradmaskWarning, OptionError, check_choice, check_keep
from gradmask.kernels import count_digits

STRATEGIES = ("fisher", "random", "random_matched", "inverse")

_DIGIT = 16  # bits settled in each reading of the values


def kth_largest(tensors: Iterable[Tensor], k: int, group: ProcessGroup | None = None) -> Tensor:
    """The k-th largest of all entries of non-negative tensors together, without joining them.

    Counts the values by their leading 16 bits, keeps the bin that holds the k-th, and goes on
    with the next 16 bits: exact, in two readings of float32 values.

    Args:
        tensors: Non-negative tensors of any shapes, dtypes and devices.
        k: Rank, from 1 for the largest.
        group: Process group over which the entries are spread; every rank gets the same result.

    Returns:
        Scalar on the CPU, float64 if any tensor is, else float32.

    Raises:
        DataError: If there are no values, or some are NaN, infinite or negative.
    """
    values = [t.detach() for t in tensors if t.numel()]
    double = any(t.dtype == torch.float64 for t in values)
    own = torch.tensor([sum(t.numel() for t in values), double], device="cpu")
    total, doubles = _over_ranks(own, group).tolist()
    if not 1 <= k <= total:
        raise DataError(f"There is no {k}-th largest of {total} values.")
    dtype, integer = (torch.float64, torch.int64) if doubles else (torch.float32, torch.int32)
    bits = torch.finfo(dtype).bits
    infinity = int(torch.tensor(math.inf, dtype=dtype, device="cpu").view(integer))
    prefix, remaining = 0, k
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        first = shift + _DIGIT == bits
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64, device="cpu")
        for tensor in values:
            count_digits(tensor.to(dtype).contiguous(), shift, None if first else prefix, counts)
        counts = _over_ranks(counts, group)
        if first and bool(counts[infinity >> shift :].any()):
            raise DataError(
                "The Fisher diagonal holds NaN, infinite or negative values: training has "
                "probably diverged (try a lower learning rate)."
            )
        above = counts.flip(0).cumsum(0)  # values at or above each digit, from the largest
        place = int(torch.searchsorted(above, remaining))
        remaining -= int(above[place - 1]) if place else 0
        prefix = prefix << _DIGIT | ((1 << _DIGIT) - 1 - place)
    return torch.tensor(prefix, dtype=integer, device="cpu").view(dtype)


def _over_ranks(counts: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of integers on the CPU over the ranks of a process group."""
    if group is None:
        return counts
    moved = counts.cuda() if dist.get_backend(group) == "nccl" else counts
    dist.all_reduce(moved, group=group)
    return moved.cpu()


def global_threshold(
    fisher: Mapping[str, Tensor], keep: float, group: ProcessGroup | None = None
) -> Tensor:
    """The value k of equation 10: the ⌈keep · m⌉-th largest of all m diagonal entries together.

    Args:
        fisher: Diagonal of the Fisher information by parameter name.
        keep: Share of the entries at or above the threshold, in (0, 1].
        group: Process group whose ranks hold each a part of the entries: the threshold is that of
            all of them together, the same to the bit on every rank.

    Returns:
        Scalar on the CPU.

    Raises:
        OptionError: If `keep` is outside (0, 1].
        DataError: If there are no values, or some are NaN, infinite or negative.
    """
    check_keep(keep)
    return kth_largest(fisher.values(), kept_count(fisher, keep, group), group)


def kept_count(fisher: Mapping[str, Tensor], keep: float, group: ProcessGroup | None = None) -> int:
    """⌈keep · m⌉ for m entries in all, with `keep` as it is written: ⌈0.1 · 30⌉ is 3, not 4."""
    own = torch.tensor([sum(t.numel() for t in fisher.values())], device="cpu")
    return math.ceil(Fraction(str(float(keep))) * int(_over_ranks(own, group)))


def make_masks(
    fisher: Mapping[str, Tensor],
    keep: float,
    *,
    strategy: str = "fisher",
    generator: torch.Generator | None = None,
    group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Masks M of equation 10 (True: the entry still learns), and the controls for it.

    Args:
        fisher: Diagonal of the Fisher information by parameter name.
        keep: Share of the entries that still learn, in (0, 1].
        strategy: `fisher`: M = 1 where a ≥ k (ties at k are kept). `random`: as many entries
            anywhere. `random_matched`: in every tensor as many as `fisher` keeps there, drawn at
            random. `inverse`: as many as `fisher` keeps, the lowest (ties drawn at random).
        generator: CPU generator of the random draws.
        group: Process group whose ranks hold each a part of the entries (`fisher` only).

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
    if strategy != "fisher" and group is not None:
        raise OptionError(f"strategy={strategy!r} draws within one process: leave group out.")
    if strategy == "random":
        total = sum(t.numel() for t in fisher.values())
        return _split(_draw(total, kept_count(fisher, keep), generator), fisher)
    threshold = global_threshold(fisher, keep, group)
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
