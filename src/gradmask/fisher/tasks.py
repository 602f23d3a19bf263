"""What a model that scores its own labels, as Hugging Face's do, is trained for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmask.containers import entry
from gradmask.errors import DataError
from gradmask.fisher.likelihood import IGNORED, Loss


class Task(NamedTuple):
    """How labels that come by name are scored.

    Attributes:
        loss: `cross_entropy`, `bernoulli` or `mse`.
        shifted: The logits of a position are scored against the label of the next (causal language
            models).
        ahead: Positions that the logits have before those of the labels (virtual tokens).
        own: Whether its mean is the loss that the model gives.
    """

    loss: str
    shifted: bool = False
    ahead: int = 0
    own: bool = False

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
        The task whose mean over what counts is the loss that the model gives; if the model gives
        none, the one that fits.

    Raises:
        DataError: If there is none, or if it cannot be told from another.
    """
    logits, own = _scored(run, inputs, labels, labelled=labelled)
    if logits is None:
        if own is None and (loss is not None or labelled is False):
            return Task(str(loss or "cross_entropy"))
        raise DataError(
            "The model's outputs have no `logits` to score the labels by: give loss=callable of "
            "(outputs, labels)."
        )
    tasks = [task for task in _candidates(logits, labels) if loss in (None, task.loss)]
    if own is not None and own.isfinite():
        errors = {task: _error(task, logits, labels, own) for task in tasks}
        near = [task for task in tasks if errors[task] <= _tolerance(own)]
        best = min(near, key=errors.__getitem__, default=None)
        resolution = max(errors[best], torch.finfo(own.dtype).eps) if best else 0.0
        others = [task for task in near if task != best and errors[task] <= 10 * resolution]
        if best and not others:
            return best._replace(own=True)
        if best is None and loss is not None and len(tasks) == 1:
            return tasks[0]
        why = "cannot be told from another" if best else "is not that of a known likelihood"
        raise _refused(why, tasks, logits, labels, own)
    if len(tasks) != 1 or (loss is None and (own is not None or labels.is_floating_point())):
        raise DataError(
            f"Labels of shape {tuple(labels.shape)} and type {labels.dtype} with logits of shape "
            f"{tuple(logits.shape)} do not say how they are scored"
            + ("" if own is None else f", as the model's own loss is {own.item()}")
            + ": give loss='cross_entropy', 'bernoulli', 'mse', or a callable of (outputs, labels)."
        )
    return tasks[0]


def check_task(task: Task, run: Callable[[Any], Any], inputs: Any, labels: Tensor) -> None:
    """Raise a DataError if the model's own loss of another batch is not that of the task."""
    with torch.no_grad():
        outputs = run({**inputs, "labels": labels})
    own, logits = entry(outputs, "loss").detach(), entry(outputs, "logits")
    # Where nothing counts there is nothing to compare.
    if own.isfinite() and _error(task, logits, labels, own) > _tolerance(own):
        raise _refused("is another than in batches before", [task], logits, labels, own)


def _scored(
    run: Callable[[Any], Any], inputs: Any, labels: Tensor, *, labelled: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Logits of a batch, and the model's own loss if it gives one."""
    with torch.no_grad():
        if not labelled:
            outputs, own = run(inputs), None
            if isinstance(outputs, Tensor):
                return None, None
        else:
            scored = run({**inputs, "labels": labels})
            own = entry(scored, "loss")
            try:
                outputs = run(inputs)
            except Exception as error:
                raise DataError(
                    f"The model does not run without its labels ({error}): give unpack=lambda "
                    "batch: (inputs, labels), with what it makes of them (decoder_input_ids) among "
                    "the inputs."
                ) from error
            if isinstance(outputs, Tensor):
                return None, None
    logits = entry(outputs, "logits")
    own = own.detach() if isinstance(own, Tensor) and own.numel() == 1 else None
    return logits if isinstance(logits, Tensor) else None, own


def _refused(why: str, tasks: list[Task], logits: Tensor, labels: Tensor, own: Tensor) -> DataError:
    found = ", ".join(_named(task, logits, labels) for task in tasks) or "none fits"
    return DataError(
        f"The model's own loss, {own.item():.6g}, {why}: of its logits {tuple(logits.shape)} and "
        f"the labels {tuple(labels.shape)} these have the means {found}. Give loss=callable of "
        "(outputs, labels)."
    )


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


def _error(task: Task, logits: Tensor, labels: Tensor, own: Tensor) -> float:
    """Difference of a task's mean from the model's own loss, relative to that."""
    value = _mean(task, logits, labels).double()
    return float((value - own.double()).abs() / own.double().abs().clamp_min(1e-12))


def _tolerance(own: Tensor) -> float:
    return 2e-2 if own.dtype in (torch.float16, torch.bfloat16) else 1e-5


def _named(task: Task, logits: Tensor, labels: Tensor) -> str:
    shifted = " of the next token" if task.shifted else ""
    return f"{task.loss}{shifted} {_mean(task, logits, labels).item():.6g}"
