"""A run that diverges: told from data that cannot be used, with what it had measured until then."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from gradmask.errors import DataError
from gradmask.recipes.data.batches import Batches
from gradmask.recipes.training.state import RunState
from gradmask.study.trial import Diverged


@contextmanager
def divergence_named(
    run: RunState, train_set: Batches, arm: str, seed: int, lr: float
) -> Iterator[None]:
    """Raise `Diverged` for errors inside that come of a network that is no longer finite.

    Args:
        run: The run, as far as it is.
        train_set: The training images as they are measured.
        arm: The arm.
        seed: The seed.
        lr: The learning rate, for the message.

    Raises:
        Diverged: If the network's weights, or its loss on a batch, are not finite.
    """
    try:
        yield
    except DataError as error:
        ended = isinstance(error, NotFinite)
        # Several processes have agreed on it, or may not have come here all of them.
        if not ended and (run.world.size > 1 or _is_finite(run, train_set)):
            raise
        reason = f"{'' if ended else 'the network is no longer finite: '}{error}"
        who = f"arm {arm!r}, seed {seed}"
        message = f"{who.capitalize()} has diverged in epoch {run.epoch}: {reason}"
        if ended:
            said = str(error).rstrip(".").replace(" is ", f" of {who} is ", 1)
            message = f"{said}: it has diverged in epoch {run.epoch}"
        known = {"epoch": run.epoch, "reason": " ".join(reason.split())}
        result = {"arm": arm, "seed": seed, "seconds": run.seconds, "epochs": run.rows}
        raise Diverged(
            f"{message.rstrip('.')}. Try a lower lr than {lr:g}.", result | {"diverged": known}
        ) from error


class NotFinite(DataError):
    """A loss is not finite, in all processes."""


def check_finite(row: dict[str, Any], *names: str) -> None:
    """Raise `NotFinite` unless measurements of an epoch are finite."""
    for name in names:
        if not math.isfinite(row[name]):
            raise NotFinite(f"{name} is {row[name]}")


@torch.no_grad()
def _is_finite(run: RunState, train_set: Batches) -> bool:
    if not all(p.isfinite().all() for p in run.model.parameters()):
        return False
    run.model.eval()
    inputs, labels = next(iter(train_set))
    return math.isfinite(F.cross_entropy(run.model(inputs), labels))
