"""What the logits of one batch say of its samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmask.errors import DataError

IGNORED = -100  # the label of what has none, as in PyTorch's losses
UNLABELLED, REFUSED = -1, -2  # rows of visits that do not count, the second kind told of
_CHUNK = 2**24  # logits at a time, for vocabularies


class Visits(NamedTuple):
    """Visits of training to samples.

    Attributes:
        rows: Row of each one's sample, int64; `UNLABELLED` or `REFUSED` if it is not to count.
        other: The most probable other class, int64, or -1 where a sample has several labels.
        values: Shape (visits, 5), float32, of each: cross-entropy of the given label in nats; share
            of the sample's labels that were not predicted; logit of the label minus the largest
            other one; probability of the label; probability of the other class if the label is
            excluded.
    """

    rows: Tensor
    other: Tensor
    values: Tensor

    def packed(self) -> Tensor:
        """All in one tensor (visits, 7), float64, which holds each value exactly."""
        return torch.column_stack([self.rows.double(), self.other.double(), self.values.double()])

    @classmethod
    def unpacked(cls, packed: Tensor) -> Visits:
        """What was packed."""
        return cls(packed[:, 0].long(), packed[:, 1].long(), packed[:, 2:].float())


@dataclass(frozen=True)
class Layout:
    """How samples, labels and logits belong together.

    Attributes:
        samples: Number of samples.
        positions: Rows that each sample has, one for a token or a label; None for one row a sample.
        multilabel: Each class is a label of its own, present or absent.
        class_dim: Dimension of the classes in the logits (default: found by the shapes).
        ignore_index: The label of what has none.
    """

    samples: int
    positions: int | None = None
    multilabel: bool = False
    class_dim: int | None = None
    ignore_index: int = IGNORED


def measure_visits(ids: Tensor, logits: Tensor, targets: Tensor, layout: Layout) -> Visits:
    """Measure what a batch says of each of its samples, or of each label.

    Args:
        ids: Numbers of the samples, shape (samples,).
        logits: Outputs before the softmax, with one dimension of classes beside those of targets.
        targets: Given labels, of shape (samples, ...).
        layout: How they belong together.

    Returns:
        The visits, on the device of the logits; those without a label, or whose logits are not
        finite, have a row that does not count.

    Raises:
        DataError: If shapes or labels do not fit.
    """
    logits = logits.detach()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ids, targets = (t.detach().to(logits.device, non_blocking=True) for t in (ids, targets))
    if _is_binary(logits, targets, layout):
        other, values, labelled = _binary(logits.reshape(targets.shape), targets, layout)
    else:
        other, values, labelled = _classes(*_classes_last(logits, targets, layout), layout)
    # The number of labels is told: of an empty batch it cannot be inferred.
    shape = len(targets), targets[:1].numel() if len(targets) else 1
    other, labelled = other.reshape(shape), labelled.reshape(shape)
    values = values.reshape(*shape, 5).float()
    rows = ids.long()[:, None]
    if layout.positions is not None:
        rows = rows * layout.positions + _places(labelled, layout.positions)
    elif labelled.shape[1] > 1:
        other, values, labelled = _mean_of_labels(values, labelled)
    margin = values[:, :, 2]
    counts = margin - margin == 0  # finite, and then so is the loss
    if ids.device.type != "cpu":  # whose ids were not looked at
        counts &= ((ids >= 0) & (ids < layout.samples))[:, None]
    rows = rows.expand_as(labelled).masked_fill(~counts, REFUSED).masked_fill(~labelled, UNLABELLED)
    return Visits(rows.flatten(), other.flatten(), values.flatten(0, 1))


def _is_binary(logits: Tensor, targets: Tensor, layout: Layout) -> bool:
    """Whether each logit is of a label of its own."""
    if layout.multilabel:
        if logits.shape != targets.shape or targets.dim() < 2:
            raise DataError(
                f"With multilabel=True the logits {tuple(logits.shape)} and targets "
                f"{tuple(targets.shape)} must have one shape, (samples, labels)."
            )
        return True
    if logits.shape == targets.shape and logits.dim() > 1 and logits.shape[-1] > 1:
        if targets.is_floating_point():
            raise DataError(
                f"The targets have the shape of the logits, {tuple(logits.shape)}: shares of each "
                "class (mixup, smoothed or soft labels). An audit needs the label that each "
                "sample was given: pass `targets.argmax(1)`, or the labels from before mixing. If "
                "each class is a label of its own: Dynamics(..., multilabel=True)."
            )
        return False
    return logits.numel() == targets.numel() and logits.shape[:1] == targets.shape[:1]


def _classes_last(logits: Tensor, targets: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    shape = tuple(logits.shape)
    usual = len(shape) == 2 and targets.dim() == 1 and layout.class_dim in (None, 1, -1)
    if usual and not targets.is_floating_point():
        return logits, targets.long()
    found = {
        dim: shape[:dim] + shape[dim + 1 :] == tuple(targets.shape)
        for dim in {1, len(shape) - 1}
        if dim < len(shape)
    }
    dim = layout.class_dim
    if dim is not None:
        if not -len(shape) <= dim < len(shape):
            raise DataError(f"Logits of shape {shape} have no dimension class_dim={dim}.")
        dim %= len(shape)
        found = {dim: shape[:dim] + shape[dim + 1 :] == tuple(targets.shape)}
    fitting = [dim for dim, fits in found.items() if fits]
    if not fitting or targets.is_floating_point():
        raise DataError(
            f"Logits of shape {shape} and {targets.dtype} targets of shape {tuple(targets.shape)} "
            "do not fit: targets are whole numbers of classes, of the logits' shape without its "
            "dimension of classes, (samples, classes, ...) or (samples, ..., classes). (If each "
            "class is a label of its own, present or absent: Dynamics(..., multilabel=True).)"
        )
    if len(fitting) > 1:
        raise DataError(
            f"In logits of shape {shape} the classes may be dimension 1 or the last one: give "
            "Dynamics(..., class_dim=1) or class_dim=-1."
        )
    logits = logits.movedim(fitting[0], -1)
    return logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).long()


def _classes(logits: Tensor, labels: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    classes = logits.shape[1]
    inside = (labels >= 0) & (labels < classes)
    if 0 <= layout.ignore_index < classes:
        inside &= labels != layout.ignore_index
    if labels.device.type == "cpu" and not inside.all():
        wrong = labels[~inside & (labels != layout.ignore_index)]
        if len(wrong):
            raise DataError(
                f"A label is {int(wrong[0])}, and the logits have {classes} classes, 0 to "
                f"{classes - 1} (what has no label is {layout.ignore_index}: ignore_index)."
            )
    labels = labels.masked_fill(~inside, 0)
    rows = max(1, _CHUNK // classes)
    if len(labels) <= rows:
        return *_of_classes(logits, labels), inside
    chunks = zip(logits.split(rows), labels.split(rows), strict=True)
    other, values = zip(*(_of_classes(*chunk) for chunk in chunks), strict=True)
    return torch.cat(other), torch.cat(values), inside


def _of_classes(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    index = labels[:, None]
    others = logits.scatter(1, index, -torch.inf).softmax(1)
    support, other = others.max(1, keepdim=True)
    margin = logits.gather(1, index) - logits.gather(1, other)
    # The odds of all others together are exp(-margin) / support.
    loss = F.softplus(-support.log() - margin, threshold=100)
    # An undecided sample counts as wrong: its label was not predicted above the others.
    return other, torch.cat([loss, (margin <= 0).to(loss.dtype), margin, (-loss).exp(), support], 1)


def _binary(logits: Tensor, targets: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """One logit a label: the other class is its absence."""
    labelled = targets != layout.ignore_index
    if targets.is_floating_point():
        labelled &= ~targets.isnan()
    inside = (targets == 0) | (targets == 1)
    if targets.device.type == "cpu" and not bool((inside | ~labelled).all()):
        raise DataError(
            f"A label is {targets[labelled & ~inside][0].item()}: with one logit a label, labels "
            f"are 0 or 1, or {layout.ignore_index} (or NaN) where there is none."
        )
    margin = torch.where(targets == 1, logits, -logits)
    loss = F.softplus(-margin, threshold=100)
    probability, other = torch.sigmoid(margin), torch.sigmoid(-margin)
    values = [loss, (margin <= 0).to(loss.dtype), margin, probability, other]
    return (targets != 1).long(), torch.stack(values, -1), inside


def _mean_of_labels(values: Tensor, labelled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The means over each sample's labels; no class is suggested for several."""
    count = labelled.sum(1, keepdim=True)
    means = torch.where(labelled[:, :, None], values, 0).sum(1) / count.clamp_min(1)
    means[:, 4] = 0
    return torch.full_like(count, -1), means[:, None], count > 0


def _places(labelled: Tensor, positions: int) -> Tensor:
    """Places of the labels within a sample."""
    found = labelled.shape[1]
    if found > positions:
        raise DataError(
            f"The targets have {found} labels a sample, and positions={positions}: give the "
            "largest number that a sample has."
        )
    return torch.arange(found, device=labelled.device)
