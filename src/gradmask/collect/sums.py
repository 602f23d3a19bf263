"""Squares of many batches, added up to a Fisher diagonal."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradmask.collect.step import Step
from gradmask.distributed import (
    Groups,
    is_sharded,
    local,
    shard_groups,
    shard_like,
    sum_over,
)
from gradmask.errors import DataError, GradmaskWarning, StateError
from gradmask.fisher.likelihood import Loss
from gradmask.fisher.reference import zero_squares
from gradmask.fisher.sharded import ShardSums
from gradmask.mask_state import placed
from gradmask.parameters import trainable_parameters


class RunningDiagonal:
    """The mean of squared per-sample gradients over all batches, or lately (exponential average).

    Args:
        model: The model whose parameters they are of.
        loss: The negative log-likelihood, which may have parameters too.

    Attributes:
        seen: Forward passes in train mode.
        average: β of an exponential average over batches; None for the mean of all.
        scale: What the loss multiplies a sample's own by, if it is known.
    """

    average: float | None
    scale: float | None

    def __init__(self, model: nn.Module, loss: Loss | None) -> None:
        self.model, self._loss = model, loss
        self.seen = 0
        self._sums: dict[str, Tensor] = {}
        self._weight: Tensor | None = None  # of what is in the sums
        self._unread: Tensor | None = None  # whether some batch's factor was guessed
        self._warned = False

    @property
    def empty(self) -> bool:
        """Whether nothing was collected since `clear`."""
        return not self._sums

    def clear(self) -> None:
        """Forget what was collected."""
        self._sums, self._weight, self._unread = {}, None, None

    def diagonal(self, groups: Groups = ()) -> dict[str, Tensor]:
        """The Fisher diagonal of what was collected, of all ranks together.

        Args:
            groups: Groups of the ranks, which all must call.

        Returns:
            `{parameter name: tensor}`, mean over samples (or batches, with `average`).

        Raises:
            DataError: If nothing was collected.
        """
        parameters = trainable_parameters(self.model, self._loss)
        weight = torch.zeros((), dtype=torch.float64, device="cpu")
        if self._weight is not None:
            weight = self._weight.cpu()
        weight = sum_over(weight, groups)
        if not weight:
            raise DataError(
                "Nothing was collected: call mask.refresh() after training steps (model.train(), "
                "loss.backward()) inside mask.collect(), at least `every` of them."
            )
        self._warn_of_unread()
        found = {}
        for name, parameter in parameters.items():
            total = self._sums.get(name)
            total = zero_squares(local(parameter)) if total is None else total
            if not is_sharded(parameter):  # else they are added up already
                total = sum_over(total, groups)
            found[name] = shard_like(total / weight.to(total), parameter)
        return found

    def _warn_of_unread(self) -> None:
        """Say once if factors were guessed."""
        if self._warned or self.scale is not None or self._unread is None or not self._unread:
            return
        self._warned = True
        warnings.warn(
            "The training's loss is no cross-entropy of one label each (mixed labels, weights, "
            "logits changed after the model), so what it multiplies a sample's own loss "
            "by was taken to be 1/N of N samples, which a mean over tokens or loss scaling is not: "
            "give mask.collect(scale=...), or to the mask the loss that is trained, loss=...",
            GradmaskWarning,
            stacklevel=4,
        )

    def state_dict(self) -> dict[str, Any]:
        """What was collected: tensors and plain numbers."""
        weight = 0.0 if self._weight is None else float(self._weight)
        parameters = trainable_parameters(self.model, self._loss)
        sums = {n: shard_like(t.clone(), parameters[n]) for n, t in self._sums.items()}
        return {"seen": self.seen, "weight": weight, "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Args:
            state: What `state_dict` returned.

        Raises:
            StateError: If it is damaged, or of another model. Nothing changes then.
        """
        parameters = trainable_parameters(self.model, self._loss)
        try:
            shapes = {name: total.shape for name, total in state["sums"].items()}
            fits = all(parameters[name].shape == shape for name, shape in shapes.items())
            fits &= state["seen"] >= 0 and state["weight"] >= 0
        except (KeyError, TypeError, AttributeError):
            fits = False
        if not fits:
            raise StateError("What the state has collected is damaged, or of another model.")
        self.seen = state["seen"]
        self._sums = {n: local(placed(s, parameters[n])) for n, s in state["sums"].items()}
        device = next(iter(parameters.values())).device
        self._weight = torch.tensor(state["weight"], dtype=torch.float64, device=device)

    def on_complete(self, batch: Step, names: Iterable[str]) -> None:
        """Add up over the ranks what is complete, so that no rank has all of the whole squares."""
        assert isinstance(batch.squares, ShardSums)
        batch.squares.weight = float(self._factor(batch)[0])
        batch.squares.on_complete(names)

    def _factor(self, batch: Step) -> tuple[Tensor, Tensor, float]:
        """What squares are multiplied by, whether that is guessed, and a sample's weight."""
        count = float(batch.count)
        device = next(iter(batch.parameters.values())).device
        scale = torch.full((), 1 / count, dtype=torch.float64, device=device)
        unread = torch.zeros((), dtype=torch.bool, device=device)
        if self.scale is not None:
            scale.fill_(self.scale)
        elif batch.scale is not None:
            unread = batch.scale.isnan().to(device)
            scale = torch.where(unread, scale, batch.scale.to(device))
        share = 1.0 if self.average is None else (1 - self.average) / count
        return share / scale.square(), unread, share

    def add(self, batch: Step) -> None:
        """Add a batch's squares, as they would be of each sample's own loss."""
        factor, unread, share = self._factor(batch)
        new = torch.full_like(factor, share * batch.count)
        found: dict[str, Tensor] = batch.squares
        if isinstance(found, ShardSums):
            found, factor = found.parts, torch.ones_like(factor)  # multiplied already
        keep = torch.full_like(factor, 1.0 if self.average is None else self.average)
        if batch.may_overflow:  # then the optimizer leaves the step out
            sums = torch.stack([s.sum().double() for s in found.values()]).sum()
            fine = sum_over(sums, shard_groups(batch.parameters.values())).isfinite()
            keep, new = torch.where(fine, keep, 1.0), torch.where(fine, new, 0.0)
            for squares in found.values():
                squares.nan_to_num_(0.0, 0.0, 0.0)
            factor, unread = torch.where(fine, factor, 0.0), unread & fine
        self._unread = unread if self._unread is None else self._unread | unread
        before = self._weight if self._weight is not None else torch.zeros_like(factor)
        self._weight = before * keep + new
        if self.average is not None:
            for total in self._sums.values():
                total *= keep.to(total)
        for name, squares in found.items():
            squares *= factor.to(squares)
            self._sums[name] = self._sums[name].add_(squares) if name in self._sums else squares
