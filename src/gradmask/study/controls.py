"""What stands where an arm has no mask: the same methods, with another effect or none.

They are `FisherMask`s, so that a training loop is the same for every arm: learning that is slowed
as much as a mask slows it is the control without which a mask's gain means little.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from gradmask import FisherMask, load_masks
from gradmask.attach import optimizers_to_hook, within
from gradmask.errors import OptimizerError
from gradmask.study.arms import Arm


class _Hooked(FisherMask):
    """Hooks of its own on all optimizers that a mask would hook, in place of the mask's."""

    def __init__(self, model: nn.Module, keep: float = 0.25, **options: Any) -> None:
        super().__init__(model, keep, **options)
        self._handles: list[Any] = []

    def attach(self, optimizer: Optimizer) -> _Hooked:
        """Let the arm act on every following step of an optimizer."""
        self._steps.used = True
        own = {id(p) for p in self._trainable().values()}
        for each in optimizers_to_hook(optimizer, own, "gradient"):
            self._handles.append(each.register_step_pre_hook(self._begin))
            self._handles.append(each.register_step_post_hook(self._after))
        return self

    def detach(self) -> None:
        """Let training go on as without the arm."""
        while self._handles:
            self._handles.pop().remove()

    def apply_(self) -> None:
        """Mask no gradient."""

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """Clip the gradients, as PyTorch does."""
        parameters = list(self._trainable().values())
        return clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)

    def _begin(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._before(optimizer)
        safe = partial(self._safe, optimizer)
        return tuple(map(safe, args)), {k: safe(v) for k, v in kwargs.items()}

    def _safe(self, optimizer: Optimizer, closure: Any) -> Any:
        """A closure whose failure ends the step for the arm too: no hook is called after it."""
        if isinstance(closure, Optimizer) or not callable(closure):
            return closure

        def safe(*args: Any, **kwargs: Any) -> Any:
            try:
                return closure(*args, **kwargs)
            except BaseException:
                self._after(optimizer)
                raise

        return safe

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        """Before a step."""

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        """After it."""


class NoMask(_Hooked):
    """Training without a mask: nothing is measured and nothing masked."""

    def refresh(self, loader: Iterable[Any] | None = None, **_: Any) -> None:
        """Measure nothing."""
        self.refreshes += 1

    def update(self, fisher: dict[str, Tensor], unused: Collection[str] = ()) -> None:
        """Make no mask."""

    def check(self, loader: Iterable[Any], **_: Any) -> None:
        """Measure nothing."""

    def collect(self, **_: Any) -> AbstractContextManager[Any]:  # type: ignore[override]
        """Collect nothing."""
        return nullcontext()


class Slow(NoMask):
    """Training without a mask at `keep` times the learning rate: lr ← keep · lr in every step.

    The rate is scaled within each step and put back after it, so that schedules made before or
    after, and code that reads the rate, go on as they are. What follows the learning rate, such as
    AdamW's weight decay, is slowed with it.
    """

    def __init__(self, model: nn.Module, keep: float = 0.25, **options: Any) -> None:
        super().__init__(model, keep, **options)
        self._rates: dict[int, tuple[Any, Any]] = {}  # as it was, and scaled, by group

    def attach(self, optimizer: Optimizer) -> Slow:
        """Slow every following step of an optimizer."""
        groups = [g for each in within(optimizer) for g in getattr(each, "param_groups", ())]
        if any(group.get("lr") is None for group in groups):
            raise OptimizerError(
                f"{type(optimizer).__name__} has no learning rate (lr) of its own to slow: give it "
                "one, or leave the arm 'slow' out."
            )
        super().attach(optimizer)
        return self

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            known = self._rates.get(id(group))
            if known is None or group["lr"] is not known[1]:  # not by the wrapper's hook already
                self._rates[id(group)] = (group["lr"], group["lr"] * self.keep)
                group["lr"] = self._rates[id(group)][1]

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            if id(group) in self._rates:
                group["lr"], _ = self._rates.pop(id(group))


class SlowMatched(_Hooked):
    """Training that is slowed in each tensor as a Fisher mask slows it: Δw ← share · Δw.

    The share of a tensor is that of its entries that a Fisher mask of the same `keep` lets learn;
    the mask is measured, and not applied. Before the first refresh every share is 1.
    """

    def __init__(self, model: nn.Module, keep: float = 0.25, **options: Any) -> None:
        super().__init__(model, keep, **options)
        self._old: dict[str, Tensor] = {}

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        if self.masks and not self._old:
            self._old = {name: p.detach().clone() for name, p in self._trainable().items()}

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        old, self._old = self._old, {}
        if old:
            shares = self.kept_fractions
            for name, parameter in self._trainable().items():
                if name in old and name in shares:  # or thawed since
                    parameter.copy_(torch.lerp(old[name], parameter, shares[name]))


def new_mask(arm: Arm, model: nn.Module, **options: Any) -> FisherMask:
    """The mask of an arm, or what stands in its place.

    Args:
        arm: The arm; its options are taken over those that are given.
        model: The model that is trained.
        options: Options of `FisherMask`.

    Returns:
        The mask, to be attached to the optimizer.

    Raises:
        StateError: If the file of a fixed mask is damaged, or does not fit the model.
    """
    own = {k: v for k, v in arm.own.items() if k not in ("patience", "rho", "file")}
    if arm.masks:
        return FisherMask(model, **{**options, **own, "strategy": arm.strategy})
    if arm.strategy == "fixed":
        masks = load_masks(arm.own["file"])
        kept = {k: v for k, v in {**options, **own}.items() if k in ("scope", "group")}
        return FixedMask.from_masks(model, masks, **kept)
    kind = {"slow": Slow, "slow_matched": SlowMatched}.get(arm.strategy, NoMask)
    return kind(model, **{**options, **own})


class FixedMask(FisherMask):
    """A mask from a file: a refresh leaves it as it is."""

    def refresh(self, loader: Iterable[Any] | None = None, **_: Any) -> None:
        """Measure nothing."""
