"""What a model that scores its own labels, as Hugging Face's do, is trained for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmask.errors import DataError
from gradmask.fisher.likelihood import IGNORED, Loss


class Task(NamedTuple):
    """How labels that come by name are scored.

    Attributes:
        loss: `cross_entropy`, `bernoulli` or `mse`.
        shifted: The logits of a position are scored against the label of the next (causal language
            models).
        ahead: Positions that the logits have before those of the labels (virtual tokens).
    """

    loss: str
    shifted: bool = False
    ahead: int = 0

    def arranged(self, logits: Tensor) -> Tensor:
        """Logits (N, ..., classes) as (N, classes, ...), whatever the sizes."""
        return logits.movedim(-1, 1) if self.loss == "cross_entropy" else logits

    def targets(self, labels: Tensor) -> Tensor:
        """Targets of the logits, position by position."""
        if self.ahead:
            labels = F.pad(labels, (self.ahead, 0), value=IGNORED)
        if self.shifted:
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return labels


def find_task(
    run: Callable[[Any], Any], inputs: Any, labels: Tensor, loss: Loss | None, *, labelled: bool
) -> Task:
    """Tell from a batch what likelihood is the model's own loss.

    Args:
        run: Calls the model.
        inputs: Inputs of the batch.
        labels: Its labels.
        loss: A name, if the user gave one.
        labelled: Whether the model takes labels too, and scores them.

    Returns:
        The task whose mean over what counts is the loss that the model gives; a loss that was
        asked for by name need not be.

    Raises:
        DataError: If there is none.
    """
    with torch.no_grad():
        outputs = run({**inputs, "labels": labels} if labelled else inputs)
    logits, own = getattr(outputs, "logits", None), getattr(outputs, "loss", None)
    if not isinstance(logits, Tensor):
        if isinstance(outputs, Tensor) or loss is not None:
            return Task(str(loss or "cross_entropy"))
        raise DataError(
            f"The model's {type(outputs).__name__} has no `logits` to score the labels by: give "
            "loss=callable of (outputs, labels)."
        )
    tasks = [task for task in _candidates(logits, labels) if loss in (None, task.loss)]
    if isinstance(own, Tensor) and own.numel() == 1 and own.isfinite():
        for task in tasks:
            if _is_near(_mean(task, logits, labels), own):
                return task
        if loss is None or len(tasks) > 1:
            raise DataError(
                f"The model's own loss, {own.item():.6g}, is not the mean of a likelihood of its "
                f"logits {tuple(logits.shape)} and the labels {tuple(labels.shape)} ("
                f"{', '.join(_named(task, logits, labels) for task in tasks) or 'none fits'}): "
                "give loss=callable of (outputs, labels)."
            )
    if not tasks or (loss is None and (len(tasks) > 1 or labels.is_floating_point())):
        raise DataError(
            f"Labels of shape {tuple(labels.shape)} and type {labels.dtype} with logits of shape "
            f"{tuple(logits.shape)} do not say how they are scored: give loss='cross_entropy', "
            "'bernoulli', 'mse', or a callable of (outputs, labels)."
        )
    return tasks[0]


def _candidates(logits: Tensor, labels: Tensor) -> Iterator[Task]:
    """What labels of such a form may be scored by."""
    if not labels.is_floating_point() and logits.shape[-1] > 1:
        if labels.shape == logits.shape[:-1]:
            yield Task("cross_entropy")
        if labels.dim() == 2 and logits.dim() == 3:
            ahead = logits.shape[1] - labels.shape[1]
            if ahead >= 0:
                yield Task("cross_entropy", shifted=True, ahead=ahead)
    if labels.numel() == logits.numel():
        if labels.min() >= 0 and labels.max() <= 1:
            yield Task("bernoulli")
        yield Task("mse")


def _mean(task: Task, logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if task.loss == "cross_entropy":
        targets = task.targets(labels).long().flatten()
        return F.cross_entropy(logits.flatten(0, -2), targets, ignore_index=IGNORED)
    targets = labels.reshape(logits.shape).to(logits.dtype)
    if task.loss == "bernoulli":
        return F.binary_cross_entropy_with_logits(logits, targets)
    return F.mse_loss(logits, targets)


def _is_near(value: Tensor, own: Tensor) -> bool:
    half = own.dtype in (torch.float16, torch.bfloat16)
    return bool(torch.isclose(value.double(), own.double(), rtol=2e-2 if half else 1e-4))


def _named(task: Task, logits: Tensor, labels: Tensor) -> str:
    shifted = " of the next token" if task.shifted else ""
    return f"{task.loss}{shifted} {_mean(task, logits, labels).item():.6g}"
