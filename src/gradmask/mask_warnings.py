"""Warnings where a mask would surprise: on what it has no say, or that nothing uses it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from gradmask.errors import GradmaskWarning, first_names
from gradmask.steps import MaskedSteps


def warn_of_unused(fisher: Mapping[str, Tensor], unused: Collection[str]) -> None:
    """Say which parameters have no information at all and so are not masked.

    Args:
        fisher: The Fisher diagonal.
        unused: Names on which the loss does not depend in eval mode.
    """
    _warn(
        f"In eval mode the loss does not depend on {_listed(fisher, unused)}: they have no Fisher "
        "information, stay out of the threshold and go on learning. Freeze what should not learn."
    )


def warn_of_use(steps: MaskedSteps, fisher: Mapping[str, Tensor], keep: float) -> bool:
    """Say if nothing uses the masks, or if `keep` counts what nothing trains.

    Args:
        steps: The steps that are masked.
        fisher: The Fisher diagonal of what the threshold is over.
        keep: Share that learns.

    Returns:
        Whether there was something to say.
    """
    moved, unheld = steps.moved_unmasked(), [n for n in steps.unheld() if n in fisher]
    if moved:
        _warn(
            "The weights changed since the mask was made, and it masks nothing: call "
            "mask.attach(optimizer) once, or mask.apply_() before each step."
        )
    if unheld:
        _warn(
            f"No attached optimizer holds {_listed(fisher, unheld)}, which keep={keep} counts: "
            "freeze what is not trained (requires_grad_(False)), or attach the optimizer that "
            "trains it."
        )
    return moved or bool(unheld)


@contextmanager
def without_log() -> Iterator[None]:
    """Keep quiet what a pass logs."""
    logger = logging.getLogger("gradmask")
    logger.addFilter(_nothing)
    try:
        yield
    finally:
        logger.removeFilter(_nothing)


def _nothing(_: logging.LogRecord) -> bool:
    return False


def _listed(fisher: Mapping[str, Tensor], chosen: Collection[str]) -> str:
    total = sum(f.numel() for f in fisher.values())
    share = sum(fisher[name].numel() for name in chosen) / max(1, total)
    return f"{first_names(chosen)} ({share:.1%} of the parameters)"


def _warn(message: str) -> None:
    warnings.warn(message, GradmaskWarning, stacklevel=4)
