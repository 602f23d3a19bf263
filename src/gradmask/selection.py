"""One exact threshold over many tensors together, and the masks it gives (equation 10)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from gradmask.distributed import Groups, local, shard_groups, shard_like, sum_over, take_shard
from gradmask.errors import (
    DataError,
    GradmaskWarning,
    OptionError,
    check_choice,
    check_keep,
    first_names,
)
from gradmask.kernels import count_digits

STRATEGIES = ("fisher", "random", "random_matched", "inverse")
WHICH = ("highest", "lowest")
PER = ("network", "tensor")

_DIGIT = 16  # bits settled in each reading of the values


def kth_largest(tensors: Iterable[Tensor], k: int, group: ProcessGroup | None = None) -> Tensor:
    """The k-th largest of all entries of non-negative tensors together, without joining them.

    Counts the values by their leading 16 bits, keeps the bin that holds the k-th, and goes on
    with the next 16 bits: exact, in two readings of float32 values.

    Args:
        tensors: Non-negative tensors of any shapes, dtypes and devices; or DTensors, which are
            spread over the processes of their mesh.
        k: Rank, from 1 for the largest.
        group: Process group over which the entries are spread; every rank gets the same result.

    Returns:
        Scalar on the CPU, float64 if any tensor is, else float32.

    Raises:
        DataError: If there are no values, or some are NaN, infinite or negative.
    """
    tensors = list(tensors)
    groups = _groups(tensors, group)
    values = [part for t in tensors if (part := local(t.detach())).numel()]
    double = any(t.dtype == torch.float64 for t in values)
    own = torch.tensor([sum(t.numel() for t in values), double], device="cpu")
    total, doubles = sum_over(own, groups).tolist()
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
        counts = sum_over(counts, groups)
        if first and bool(counts[infinity >> shift :].any()):
            raise DataError(
                "The Fisher diagonal (or the score) holds NaN, infinite or negative values: "
                "training has probably diverged (try a lower learning rate)."
            )
        above = counts.flip(0).cumsum(0)  # values at or above each digit, from the largest
        index = int(torch.searchsorted(above, remaining))
        remaining -= int(above[index - 1]) if index else 0
        prefix = prefix << _DIGIT | ((1 << _DIGIT) - 1 - index)
    return torch.tensor(prefix, dtype=integer, device="cpu").view(dtype)


def _groups(tensors: Iterable[Tensor], group: ProcessGroup | None) -> Groups:
    return shard_groups(tensors) if group is None else (group,)


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
    own = torch.tensor([sum(local(t).numel() for t in fisher.values())], device="cpu")
    total = sum_over(own, _groups(fisher.values(), group))
    return math.ceil(Fraction(str(float(keep))) * int(total))


def make_masks(
    fisher: Mapping[str, Tensor],
    keep: float,
    *,
    strategy: str = "fisher",
    which: str = "highest",
    per: str = "network",
    generator: torch.Generator | None = None,
    group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Masks M of equation 10 (True: the entry still learns), and the controls for it.

    The masks of DTensors are those that the whole tensors would have, each in the same shards.

    Args:
        fisher: Diagonal of the Fisher information by parameter name.
        keep: Share of the entries that still learn, in (0, 1].
        strategy: `fisher`: M = 1 where a ≥ k (ties at k are kept). `random`: as many entries
            anywhere. `random_matched`: in every tensor as many as `fisher` keeps there, drawn at
            random. `inverse`: as `fisher` with `which="lowest"`.
        which: `fisher` keeps the `highest` entries, or as many of the `lowest` (ties drawn at
            random); the share `keep` of them where the threshold of the highest is 0.
        per: One threshold for the whole `network`, or one for each `tensor`, of which each then
            keeps its share.
        generator: CPU generator of the random draws; in the same state on every rank.
        group: Process group whose ranks hold each a part of the entries (the highest only).

    Returns:
        `{name: bool tensor of the same shape and device}`.

    Raises:
        OptionError: If an option is out of range or unknown, or a generator is missing.
        DataError: If values are NaN, infinite or negative (`random` reads only the shapes).
    """
    check_keep(keep)
    check_selection(strategy, which, per)
    drawn = f"strategy={strategy!r}" if strategy != "fisher" else f"which={which!r}"
    if strategy != "fisher" or which == "lowest":
        if generator is None:
            raise OptionError(f"{drawn} draws at random: pass a seeded generator.")
        if group is not None:
            raise OptionError(f"{drawn} draws within one process: leave group out.")
    if strategy == "inverse":
        strategy, which = "fisher", "lowest"
    parts = [dict(fisher)] if per == "network" else [{name: a} for name, a in fisher.items()]
    masks: dict[str, Tensor] = {}
    without: list[str] = []
    for part in parts:
        if per == "tensor" and not any(a.numel() for a in part.values()):
            masks |= {name: torch.ones_like(a, dtype=torch.bool) for name, a in part.items()}
        elif strategy == "random":
            masks |= _largest(random_numbers(part, generator), kept_count(part, keep))
        else:
            threshold = global_threshold(part, keep, group)
            if which == "highest" and float(threshold) == 0.0 and keep < 1.0:
                without += part
            masks |= _chosen(part, keep, threshold, strategy, which, generator)
    if without:
        where = "" if per == "network" else f" in {first_names(without)}"
        warnings.warn(
            f"The threshold at keep={keep} is 0{where}: more than {1 - keep:.0%} of the parameters "
            "have no Fisher information (a score of 0), so the mask keeps everything. Measure on "
            "more samples, or look for dead layers.",
            GradmaskWarning,
            stacklevel=2,
        )
    return masks


def check_selection(strategy: str, which: str, per: str) -> None:
    """Check how a mask's entries are to be chosen.

    Args:
        strategy: As `make_masks` takes it.
        which: As `make_masks` takes it.
        per: As `make_masks` takes it.

    Raises:
        OptionError: If one is unknown, or two contradict each other.
    """
    check_choice("strategy", strategy, STRATEGIES)
    check_choice("which", which, WHICH)
    check_choice("per", per, PER)
    if which == "lowest" and strategy in ("inverse", "random"):
        raise OptionError(
            f"which='lowest' says nothing more of strategy={strategy!r}: leave one of them out."
        )


def _chosen(
    fisher: Mapping[str, Tensor],
    keep: float,
    threshold: Tensor,
    strategy: str,
    which: str,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """What `fisher` keeps at a threshold, the lowest instead, or as many at random."""
    masks = _compare(torch.ge, fisher, threshold)
    if strategy == "fisher" and which == "highest":
        return masks
    keys = random_numbers(fisher, generator)
    if which == "lowest":  # where most are zero, `highest` keeps all: as many would protect nothing
        count = sum(kept_counts(masks).values()) if float(threshold) else kept_count(fisher, keep)
        masks = _lowest(fisher, count, keys)
    if strategy == "fisher":
        return masks
    if which == "lowest":  # ties were drawn by the same numbers
        keys = random_numbers(fisher, generator)
    counts = kept_counts(masks)
    return {name: _largest({name: key}, counts[name])[name] for name, key in keys.items()}


def kept_counts(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """How many entries of every mask are True, in all its shards together."""
    own = torch.tensor([int(local(m).sum()) for m in masks.values()], device="cpu")
    return dict(zip(masks, sum_over(own, shard_groups(masks.values())).tolist(), strict=True))


def _compare(
    relation: Callable[[Tensor, Tensor], Tensor], values: Mapping[str, Tensor], bound: Tensor
) -> dict[str, Tensor]:
    """Compare in the bound's precision: PyTorch would round the bound to that of each tensor."""
    return {
        name: shard_like(relation(local(a).to(bound.dtype), bound.to(a.device)), a)
        for name, a in values.items()
    }


def random_numbers(
    like: Mapping[str, Tensor], generator: torch.Generator | None
) -> dict[str, Tensor]:
    """A random number for every entry, the same one however the tensors are sharded.

    In float64, where the chance of equal ones is about m² / 2⁵⁴ for m entries, and only those at a
    threshold would matter.

    Args:
        like: Tensors by name, whose shapes, devices and shards they have.
        generator: CPU generator, in the same state on every rank.
    """
    options: dict[str, Any] = {"dtype": torch.float64, "device": "cpu", "generator": generator}
    return {
        name: shard_like(take_shard(torch.rand(t.shape, **options), t).to(t.device), t)
        for name, t in like.items()
    }


def _largest(values: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The `count` largest entries."""
    if not count:
        return _compare(torch.gt, values, torch.tensor(math.inf, dtype=torch.float64, device="cpu"))
    return _compare(torch.ge, values, kth_largest(values.values(), count))


def _lowest(
    fisher: Mapping[str, Tensor], count: int, keys: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The `count` smallest entries; zeros are many, so ties are broken at random, exactly."""
    total = kept_count(fisher, 1.0)
    bound = kth_largest(fisher.values(), total - count + 1)
    masks, ties = _compare(torch.lt, fisher, bound), _compare(torch.eq, fisher, bound)
    missing = count - sum(kept_counts(masks).values())
    # Keys of the ties, moved up by one from those of all others, which are 0.
    keyed = {n: shard_like((local(keys[n]) + 1) * local(ties[n]), keys[n]) for n in ties}
    chosen = _largest(keyed, missing)
    return {n: shard_like(local(m) | local(chosen[n]), m) for n, m in masks.items()}
