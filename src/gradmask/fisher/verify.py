"""The check of a measuring pass: what samples gave together against what each gives alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gradmask.errors import OptionError, first_names

logger = logging.getLogger("gradmask")

Verify = Literal["spread", "all"] | bool
Excerpts = dict[str, Tensor]

# Relative to the norm of what one sample alone gives; a wrong rule or layout is off by its size.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-2}
_ROUGH = 0.3  # half precision and autocast
_EXCERPT = 1 << 16  # entries of a tensor that are compared, about


def check_verify(verify: Any) -> None:
    """Raise an OptionError unless this says how to check a pass.

    Args:
        verify: The option.
    """
    if verify is not False and verify not in ("spread", "all"):
        raise OptionError(
            f"verify={verify!r} must be 'spread' (some samples, at growing intervals), 'all' or "
            "False."
        )


class Check(NamedTuple):
    """What is checked in a batch.

    Attributes:
        rows: Samples.
        turn: Number of the check, which says the entries of large tensors.
    """

    rows: slice
    turn: int


class Schedule:
    """Which samples of which batches are checked.

    Two of the first batch and of every batch whose graph has other operations; one of batches 9,
    81, 729, ..., of the 1st, 2nd, 4th, 8th, ... batch of sizes not seen before and, as long as
    some parameters have had no gradient in any check, of batches 2, 4, 8, ... (not in a pass like
    an earlier one, which did so).

    Args:
        verify: `spread`, `all` or False.
        names: What is measured.
        seed: Seed of the choice of samples.
    """

    def __init__(self, verify: Verify, names: Iterable[str], seed: int = 0) -> None:
        check_verify(verify)
        self.verify, self._unseen = verify, set(names)
        self._generator = torch.Generator().manual_seed(seed)
        self._batches = self._sizes = self._turn = 0
        self._passed = False
        self._known: set[Hashable] = set()

    def check(
        self, structure: Hashable, sizes: Hashable, samples: int, *, passed: bool = False
    ) -> Check | None:
        """What to check in the next batch, if anything.

        Args:
            structure: Tells graphs of other operations apart.
            sizes: Tells graphs of other sizes apart.
            samples: Samples in the batch.
            passed: Such a batch has been checked in an earlier pass: one sample is enough.
        """
        if not self.verify:
            return None
        self._batches += 1
        self._passed |= passed
        new = structure not in self._known
        resized = not new and sizes not in self._known
        self._known |= {structure, sizes}
        self._sizes += resized
        due = (
            new
            or (resized and _is_power(self._sizes, 2))
            or _is_power(self._batches, 9)
            or (self._unseen and not self._passed and _is_power(self._batches, 2))
        )
        if not (due or self.verify == "all"):
            return None
        self._turn += 1
        chosen = (
            torch.randperm(samples, generator=self._generator, device="cpu")[
                : 1 + (new and not passed)
            ]
            .sort()
            .values
        )
        first, last = int(chosen[0]), int(chosen[-1])
        pair = slice(first, last + 1, max(1, last - first))
        return Check(slice(None) if self.verify == "all" else pair, self._turn)

    def wrong(
        self, found: Excerpts, alone: Excerpts, precision: torch.dtype, power: int = 2
    ) -> set[str]:
        """Names whose squares differ from those of the same samples alone beyond rounding.

        Args:
            found: Excerpts of the squares of the checked samples, as measured in the batch.
            alone: Of the same samples, each alone.
            precision: What the model computes in.
            power: 2 for squares, 1 for gradients.
        """
        if not alone:
            return set()
        relative = rounding(precision)
        # Gradients that cancel to zero leave rounding behind.
        noise = (4 if relative == _ROUGH else 32) * torch.finfo(precision).eps
        rows = [_compared(found[name], value) for name, value in alone.items()]
        errors, sizes, largest = torch.stack(rows).cpu().unbind(1)
        counts = torch.tensor(
            [a.numel() for a in alone.values()], dtype=torch.float64, device="cpu"
        )
        floor = noise**power * largest.max() * counts.sqrt()
        seen, off = sizes > floor, ~(errors <= relative * sizes + floor)
        self._unseen -= {name for name, flag in zip(alone, seen.tolist(), strict=True) if flag}
        return {name for name, flag in zip(alone, off.tolist(), strict=True) if flag}


def rounding(precision: torch.dtype) -> float:
    """Relative difference that rounding may make in what a model computes in a precision."""
    return _TOLERANCE.get(precision, _ROUGH)


def _compared(found: Tensor, alone: Tensor) -> Tensor:
    """Norm of the difference, norm of the larger, and largest entry."""
    if not alone.numel():
        return alone.new_zeros(3)
    larger = torch.maximum(alone.abs(), found.abs())
    return torch.stack([(found - alone).norm(), larger.norm(), alone.abs().max()])


def warn_of_failed(wrong: set[str]) -> None:
    """Say that everything is measured one sample at a time after a failed check.

    If samples are mixed, names whose gradient happened to be zero in the check are wrong too.

    Args:
        wrong: Names for which it failed.
    """
    logger.warning(
        "The check of single samples failed for %s: all parameters are measured with the whole "
        "model, one sample at a time, which is right and slow. Samples may be mixed inside the "
        "model, or a rule of a layer may be wrong.",
        first_names(wrong),
    )


def excerpt(tensor: Tensor, turn: int) -> Tensor:
    """Some entries of a tensor: all if there are few, else some of every row.

    Args:
        tensor: Any shape; a row is what has the same place in dimension 0 (a row of an embedding
            may be zero in most samples).
        turn: Says which entries.

    Returns:
        One dimension, float64 or complex128.
    """
    matrix = tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.flatten(1)
    step = max(1, tensor.numel() // _EXCERPT)
    chosen = matrix[:, turn % max(1, min(step, matrix.shape[1])) :: step].reshape(-1)
    return chosen.to(torch.complex128 if tensor.is_complex() else torch.float64)


def computed_in(tensors: Iterable[Tensor]) -> torch.dtype:
    """The lowest precision that a model with these parameters computes in."""
    found = list(tensors)
    kinds = {t.dtype.to_real() for t in found if t.is_floating_point() or t.is_complex()}
    for device in {t.device.type for t in found}:
        if torch.is_autocast_enabled(device):
            kinds.add(torch.get_autocast_dtype(device))
        if device == "cuda" and torch.get_float32_matmul_precision() != "highest":
            kinds.add(torch.bfloat16)
    return max(kinds, key=lambda kind: torch.finfo(kind).eps, default=torch.float32)


def _is_power(number: int, base: int) -> bool:
    return number >= 1 and base ** round(math.log(number, base)) == number
