"""Samples whose label is wrong for certain, and the threshold that they calibrate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from gradmask.errors import DataError, OptionError, check_choice
from gradmask.seeding import seeded_generator

SHARE = 0.05
FEWEST = 20  # planted samples that say something of a distribution
TAIL = 0.1  # share of the planted samples by which the number of wrong labels is estimated


@dataclass(frozen=True)
class Planted:
    """A part of the samples whose label was made wrong.

    Attributes:
        ids: Their numbers, ascending.
        labels: Labels to train on: those given, but for the planted samples.
        kind: What the planted samples have: another `label`, or a `class` of their own.
        originals: Labels from before, where they are known.
    """

    ids: Tensor
    labels: Tensor
    kind: str = "label"
    originals: Tensor | None = None


def whole_labels(labels: Any) -> Tensor:
    """Labels as int64, on the CPU; -1 for those that are not a number.

    Args:
        labels: A tensor, an array or a list.

    Raises:
        DataError: If they are not whole numbers.
    """
    try:
        found = torch.as_tensor(labels, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"labels must be whole numbers of classes, and are a {type(labels).__name__} of others."
        ) from error
    if found.is_floating_point():
        found = found.nan_to_num(-1.0)
        if (found != found.round()).any():
            raise DataError(f"labels must be whole numbers of classes, and are {found.dtype}.")
    return found.long()


def plant(
    labels: Tensor | Sequence[int],
    classes: int,
    *,
    share: float = SHARE,
    kind: Literal["label", "class"] = "label",
    seed: int = 0,
) -> Planted:
    """Make the labels of a small random part of the samples wrong, to calibrate a threshold.

    What training then says of them is what it says of a wrong label (`rank(..., planted=...)`).
    They are not audited themselves: another `seed` plants others.

    `kind="label"` draws another class for each. `kind="class"` gives all of them a class of their
    own, number `classes`, for which the network needs one output more (Pleiss et al., 2020): it
    cannot be right by chance, as another label is for a share of wrong labels ÷ (classes − 1), but
    networks find it plausible for every sample, so that wrong labels among the real classes are
    more suspicious than it: promises made by it did not hold (`docs/audit.md`).

    Args:
        labels: Given labels, shape (samples,).
        classes: Number of classes.
        share: Share of the samples.
        kind: What they get.
        seed: Seed of the choice.

    Returns:
        The planted samples, and labels to train on, int64.

    Raises:
        OptionError: If the share leaves too few planted samples, or is not below one half.
        DataError: If labels are out of range.
    """
    device = labels.device if isinstance(labels, Tensor) else torch.device("cpu")
    labels = whole_labels(labels).to(device)
    check_choice("kind", kind, ("label", "class"))
    if not isinstance(classes, Integral) or classes < 2:
        raise OptionError(f"classes={classes!r} must be a whole number, at least 2.")
    count = round(len(labels) * share) if isinstance(share, Real) and 0 < share < 0.5 else 0
    if count < FEWEST:
        raise OptionError(
            f"share={share!r} of {len(labels)} samples must be below one half, and at least "
            f"{FEWEST} samples."
        )
    if labels.dim() != 1 or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise DataError(f"labels must be of shape (samples,), from 0 to {classes - 1}.")
    generator = seeded_generator(seed, "planted")
    ids = torch.randperm(len(labels), generator=generator, device="cpu")[:count].sort().values
    offset = torch.randint(1, int(classes), (count,), generator=generator, device="cpu")
    ids, offset = ids.to(labels.device), offset.to(labels.device)
    wrong = (labels[ids] + offset) % classes if kind == "label" else torch.full_like(ids, classes)
    return Planted(ids, labels.scatter(0, ids, wrong), kind, originals=labels.cpu())


@dataclass(frozen=True)
class Threshold:
    """Where to cut, and what is to be expected there.

    Attributes:
        value: Samples of at least this suspicion are flagged; infinite if none can be.
        false_alarms: Share of the flagged samples whose label is expected to be right.
        wrong_share: Share of all samples whose label is estimated to be wrong.
        found_share: Share of wrong labels that are expected to be flagged.
    """

    value: float
    false_alarms: float
    wrong_share: float
    found_share: float


def check_false_alarms(share: float) -> None:
    """Raise an OptionError unless a share is between 0 and 1."""
    if not isinstance(share, Real) or not 0 < share < 1:
        raise OptionError(f"false_alarms={share!r} must be between 0 and 1.")


def threshold(suspicion: Tensor, planted: Tensor, false_alarms: float) -> Threshold:
    """The lowest cut at which no more than a share of the flagged samples is expected to be right.

    If wrong labels are as suspicious as planted ones, S_w(t) = P(suspicion ≥ t), and the samples
    are a mixture S = π S_w + (1 − π) S_right, then the share π of wrong labels is at most
    S(t) / S_w(t) for every t, and equal where no right label is: the least of these ratios
    estimates it. Of the samples beyond t, 1 − π S_w(t) / S(t) are right. Wrong labels that are less
    suspicious than planted ones, such as those of similar classes, make the estimate of π too low
    and that of false alarms too high: fewer samples are flagged, and the promise holds.

    Args:
        suspicion: Of the samples that are audited.
        planted: Of the planted samples.
        false_alarms: The share that is allowed, in (0, 1).

    Returns:
        The threshold.

    Raises:
        OptionError: If there are too few samples, or the share is out of range.
    """
    check_false_alarms(false_alarms)
    if len(planted) < FEWEST or not len(suspicion):
        raise OptionError(f"{len(planted)} planted samples are too few: plant at least {FEWEST}.")
    cuts, ordered = planted.double().sort().values, suspicion.double().sort().values
    place = torch.arange(len(cuts), dtype=torch.float64, device=cuts.device)
    wrong = 1 - place / len(cuts)  # S_w at each cut
    every = 1 - torch.searchsorted(ordered, cuts).double() / len(ordered)  # S there
    ratio = every / wrong
    # Ratios of a few samples say nothing, and the least of them would be one of those.
    wrong_share = float(ratio[wrong >= max(TAIL, FEWEST / len(cuts))].min().clamp(0, 1))
    alarms = (1 - wrong_share * wrong / every).clamp(0, 1)  # NaN where nothing is beyond
    allowed = (alarms <= false_alarms).nonzero()
    if not len(allowed) or wrong_share == 0:
        return Threshold(torch.inf, 0.0, wrong_share, 0.0)
    first = int(allowed[0])
    return Threshold(float(cuts[first]), float(alarms[first]), wrong_share, float(wrong[first]))
