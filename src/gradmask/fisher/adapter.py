"""What a loader gives, as inputs and targets, and how inputs become a call of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from gradmask.containers import check_cuttable, map_tensors, sample_count, tensors_in
from gradmask.errors import DataError, OptionError
from gradmask.fisher.likelihood import IGNORED, Loss
from gradmask.fisher.losses import likelihood_of, takes_logits
from gradmask.fisher.scored import Padded, Scored, accepts, call, has_names, takes_one
from gradmask.fisher.tasks import check_task, find_task

Unpack = Callable[[Any], Any]

LABELS = ("labels", "label", "targets", "target")  # what a batch with names may call its targets


class Batch(NamedTuple):
    """What a loader gave.

    Attributes:
        inputs: What the model is called with.
        targets: As they came.
        scored: Whether they are labels as the model itself scores them.
    """

    inputs: Any
    targets: Tensor
    scored: bool


class Adapter:
    """How the batches of a loader become inputs and targets, and what they are scored by.

    Args:
        model: The model.
        loss: The negative log-likelihood; None for what the first batch says.
        unpack: The user's own way from a batch to `(inputs, targets)`, or to a mapping.

    Attributes:
        model: What the inputs go to.
    """

    def __init__(self, model: nn.Module, loss: Loss | None, unpack: Unpack | None = None) -> None:
        self._name = likelihood_of(loss)
        self._named = loss is None or self._name is not None
        of_classes = self._named and self._name in (None, "cross_entropy")
        scored = model if isinstance(model, Scored) else Scored(model, of_classes)
        self._scored = scored if self._named or takes_logits(loss) else None
        self.model = self._scored or model
        self._bare, self._loss, self._unpack = model, loss, unpack
        self._device = next(model.parameters()).device
        self._batches = 0

    @property
    def unpacks(self) -> bool:
        """Whether the user says how."""
        return self._unpack is not None

    @property
    def loss(self) -> Loss:
        """The negative log-likelihood, once a batch has been seen."""
        task = self._scored.task if self._scored else None
        return self._loss or (task.loss if task else "cross_entropy")

    def read(self, batches: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
        """Inputs and targets of the batches that hold samples, on the device."""
        return map(self.score, self.parse_all(batches))

    def parse_all(self, batches: Iterable[Any]) -> Iterator[Batch]:
        """The batches that hold samples, on the device; the model does not run."""
        return (found for found in map(self.parse, batches) if len(found.targets))

    def __call__(self, batch: Any) -> tuple[Any, Tensor]:
        """Inputs and targets of one batch, checked, on the device.

        Raises:
            DataError: If it has no such form.
        """
        return self.score(self.parse(batch))

    def parse(self, batch: Any) -> Batch:
        """One batch, checked, on the device; the model does not run.

        Raises:
            DataError: If it has no such form.
        """
        batch = _with_names(self._unpack(batch) if self._unpack else batch)
        pair = _parts(batch)
        check_cuttable(pair[0], "inputs")
        _check_strided(pair[0])
        inputs, targets = (map_tensors(self._move, part) for part in pair)
        if not isinstance(targets, Tensor) or not targets.dim():
            raise DataError(
                f"The targets of a batch are a {type(targets).__name__}: expected a tensor of "
                "shape (samples, ...)."
            )
        sample_count((inputs, targets))
        if not has_names(batch):
            return Batch(inputs, targets, False)
        return Batch(self._arguments(inputs, targets), targets, self._named)

    def score(self, batch: Batch) -> tuple[Any, Tensor]:
        """Inputs and targets of a batch; the model may run, to find or to check its likelihood.

        Raises:
            DataError: If the model's own loss is of no known form, or of another than before.
        """
        inputs, targets, scored = batch
        if not scored or not len(targets):
            return inputs, targets
        assert self._scored is not None
        run = lambda given: call(self._bare, given)  # noqa: E731
        self._batches += 1
        task = self._scored.task
        if task is not None and task.own and self._batches.bit_count() == 1:  # the 2nd, 4th, 8th
            check_task(task, run, inputs, targets)
        if task is None:
            labelled = has_names(inputs) and accepts(self._bare, {**inputs, "labels": targets})
            task = find_task(run, inputs, targets, self._name, labelled=labelled)
            self._scored.task = task
        return inputs, task.targets(targets)

    def inputs(self, batch: Any) -> Any:
        """Inputs of a batch that may have targets by name, checked, on the device.

        Positions that its targets ignore do not count, or else those that it pads.
        """
        if has_names(batch) and any(name in batch for name in LABELS):
            inputs, targets = self(batch)
            return _padded(inputs, targets != IGNORED, self._scored)
        blank = torch.empty(sample_count(batch), device=self._device)
        inputs = Adapter(self._bare, self._loss)((batch, blank))[0]
        if not has_names(inputs):
            return inputs
        given = dict(inputs)
        decodes = any(str(name).startswith("decoder_") for name in given)
        mask = given.get("decoder_attention_mask" if decodes else "attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return inputs
        ahead = self._scored.task.ahead if self._scored and self._scored.task else 0
        return _padded(inputs, F.pad(mask, (ahead, 0)) != 0, self._scored)

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)

    def _arguments(self, inputs: dict[str, Any], targets: Tensor) -> Any:
        """What the model's forward takes of a batch with names."""
        prepare = getattr(self._bare, "prepare_decoder_input_ids_from_labels", None)
        if prepare is not None and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs):
            inputs = {**inputs, "decoder_input_ids": prepare(labels=targets)}
        if accepts(self._bare, inputs):
            return inputs
        if len(inputs) == 1:
            return next(iter(inputs.values()))
        if takes_one(self._bare, (), inputs):
            return inputs
        raise DataError(
            f"The batch's entries {', '.join(inputs)} are not what the forward method of "
            f"{type(self._bare).__name__} takes: give unpack=lambda batch: (inputs, targets)."
        )


def started(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches, the first of them read already."""
    first = next(batches, None)
    return iter(()) if first is None else chain([first], batches)


def check_batches(loader: Any) -> None:
    """Raise a DataError unless this can be read batch by batch."""
    if isinstance(loader, Dataset) or not isinstance(loader, Iterable):
        raise DataError(
            f"Expected batches of (inputs, targets), not a {type(loader).__name__}: a dataset goes "
            "into a torch.utils.data.DataLoader first."
        )


def check_unpack(unpack: Any) -> None:
    """Raise an OptionError unless this is a function, or nothing."""
    if unpack is not None and not callable(unpack):
        raise OptionError(f"unpack={unpack!r} must be a function of a batch: (inputs, targets).")


def as_batch(batch: Any) -> Any:
    """A batch as a pair of inputs and targets, or as a dict with `labels`.

    Raises:
        DataError: If it has no such form.
    """
    inputs, targets = _parts(batch := _with_names(batch))
    inputs = {str(key): inputs[key] for key in inputs} if has_names(inputs) else inputs
    return {**inputs, "labels": targets} if has_names(batch) else (inputs, targets)


def _parts(batch: Any) -> tuple[Any, Any]:
    """Inputs and targets of a batch."""
    if has_names(batch):
        found = {str(key): batch[key] for key in batch.keys()}  # noqa: SIM118
        names = [name for name in LABELS if name in found]
        if len(names) == 1:
            targets = found.pop(names[0])
            return found, targets
        what = f"a {type(batch).__name__} with the entries {', '.join(found)}"
    elif isinstance(batch, tuple | list):
        if len(batch) == 2:
            return batch[0], batch[1]
        what = f"a {type(batch).__name__} of {len(batch)}"
    else:
        what = f"a {type(batch).__name__}"
    if isinstance(batch, Tensor):
        what += " (of one batch alone, give a list: [batch])"
    raise DataError(
        f"The loader gave {what}: expected (inputs, targets) batches, or a mapping with its "
        f"targets as one of {', '.join(LABELS)}. Else give unpack=lambda batch: (inputs, targets)."
    )


def _padded(inputs: Any, counts: Tensor, scored: Scored | None) -> Any:
    task = scored.task if scored else None
    labels = task is not None and task.loss == "cross_entropy"
    return Padded(inputs, counts) if labels and not counts.all() else inputs


def _with_names(batch: Any) -> Any:
    """A named tuple that says which of its fields are targets, as a mapping."""
    fields = getattr(batch, "_fields", ()) if isinstance(batch, tuple) else ()
    return dict(zip(fields, batch, strict=True)) if set(fields) & set(LABELS) else batch


def _check_strided(inputs: Any) -> None:
    for tensor in tensors_in(inputs):
        if tensor.layout != torch.strided or tensor.is_nested:
            raise DataError(
                "The inputs hold a sparse or nested tensor, which cannot be cut into samples: use "
                "to_dense() or to_padded_tensor()."
            )
