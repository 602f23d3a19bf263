"""Whether training follows the loss that a mask measures, as its first step tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from math import isclose, isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmask import distributed
from gradmask.seeding import own_random_state

_IGNORED = -100
_HALF = (torch.float16, torch.bfloat16)


class CrossEntropyNote:
    """Notes the cross-entropy of whatever a module returns, in the calls that training makes.

    Args:
        module: The module; it has a forward hook until `remove`.
        targets: The targets of its outputs; None if they are not known.
    """

    def __init__(self, module: nn.Module, targets: Any) -> None:
        self._calls, self._half = 0, False
        self._means: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._targets = targets if isinstance(targets, Tensor) else None
        self._handle = module.register_forward_hook(self._note)

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    def difference(self, loss: Tensor, other_calls: int = 0) -> str | None:
        """How a loss differs, by more than rounding, from the mean and the sum of every call.

        Args:
            loss: What was trained.
            other_calls: Calls that are not of the loss.

        Returns:
            The difference in words; None if there is none, or outputs or targets do not say.
        """
        if self._calls <= other_calls:
            return "training_step does not call it"
        found, trained = [v.item() for v in (*self._means, *self._sums)], loss.item()
        near = 2e-2 if self._half or loss.dtype in _HALF else 1e-3
        same = any(isclose(trained, v, rel_tol=near, abs_tol=near / 100) for v in found)
        if same or not found or not isfinite(trained):
            return None
        return f"that is {found[0]:.6g} in the first batch, where training_step has {trained:.6g}"

    def _note(self, _: nn.Module, __: Any, outputs: Any) -> None:
        self._calls += 1
        logits = getattr(outputs, "logits", outputs)
        # What does not fit must not end training: measuring says so.
        with torch.no_grad(), suppress(RuntimeError, ValueError, TypeError, IndexError):
            fitting = _logits_and_targets(logits, self._targets)
            if fitting is not None:
                self._half |= logits.dtype in _HALF
                self._means.append(F.cross_entropy(*fitting))
                self._sums.append(F.cross_entropy(*fitting, reduction="sum"))


class OwnLossNote:
    """Notes whether backward passes go through the loss that a model returns.

    Args:
        model: A model of Hugging Face's; it has a forward hook until `remove`.

    Attributes:
        called: Whether the model was called with gradients.
        followed: Whether a backward pass went through its loss.
    """

    def __init__(self, model: nn.Module) -> None:
        self.called = self.followed = False
        self._handle = model.register_forward_hook(self._note)

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    def _note(self, _: nn.Module, __: Any, outputs: Any) -> None:
        self.called |= torch.is_grad_enabled()
        named = isinstance(outputs, Mapping)
        loss = outputs.get("loss") if named else outputs[0] if isinstance(outputs, tuple) else None
        # A first output that is no loss is not a scalar.
        if isinstance(loss, Tensor) and loss.requires_grad and (named or loss.dim() == 0):
            loss.register_hook(self._follow)

    def _follow(self, _: Tensor) -> None:
        self.followed = True


def targets_of(batch: Any, unpack: Callable[[Any], Any] | None) -> Any:
    """Targets of a training batch, if it is known where they are.

    Args:
        batch: What a loader gives.
        unpack: Makes inputs and targets of it.
    """
    if unpack is not None:
        try:
            with own_random_state("unpack"):
                batch = unpack(batch)
        except Exception:  # told when it is measured
            return None
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    return batch[1] if pair else None


def is_compiled(model: nn.Module) -> bool:
    """Whether a model or part of it is compiled, so that hooks would have it compiled again."""
    return any(
        distributed.is_compiled(module)
        or getattr(module, "_compiler_ctx", None) is not None  # of Lightning
        for module in model.modules()
    )


def _logits_and_targets(logits: Any, targets: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Logits (N, classes, ...) and their targets, if they have the shapes of such."""
    if targets is None or not isinstance(logits, Tensor) or not logits.is_floating_point():
        return None
    if logits.dim() < 2 or not logits.numel():
        return None
    logits = logits.float() if logits.dtype in _HALF else logits
    if targets.is_floating_point():
        return (logits, targets.to(logits)) if targets.shape == logits.shape else None
    if targets.shape != (logits.shape[0], *logits.shape[2:]):
        if targets.shape != logits.shape[:-1]:
            return None
        logits = logits.movedim(-1, 1)
    targets = targets.long()
    counted = targets[targets != _IGNORED]
    # A label out of range would end a GPU's context.
    if not len(counted) or counted.min() < 0 or counted.max() >= logits.shape[1]:
        return None
    return logits, targets
