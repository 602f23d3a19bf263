"""Masks of what training's own backward passes collect, for callbacks that train step by step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gradmask import FisherMask
from gradmask.distributed import data_groups, rank_and_world_size, sum_over
from gradmask.errors import ModelError, OptionError
from gradmask.integrations.schedule import Schedule


def check_online(keep: float, every: int, options: Mapping[str, Any], **data: Any) -> None:
    """Refuse options of passes that training makes none of.

    Args:
        keep: Share that learns.
        every: One of so many batches is collected.
        options: Options of `FisherMask`.
        data: Loaders to measure on, by name.

    Raises:
        OptionError: If one has no use, or is out of range.
        ModelError: If the loss has parameters of its own.
    """
    given = {**data, **{name: options.get(name) for name in ("max_samples", "unpack")}}
    for name, value in given.items():
        if value is not None:
            raise OptionError(
                f"{name}= is for passes over data, and refresh='online' measures the batches and "
                f"the loss that are trained: leave {name} out, or use refresh='epoch'."
            )
    if options.get("strategy") == "random":
        raise OptionError(
            "strategy='random' measures nothing: use refresh='epoch' or a number of steps."
        )
    if options.get("kind", "empirical") != "empirical":
        raise OptionError(
            f"kind={options['kind']!r} draws labels of its own, and training has those of the "
            "data: use kind='empirical', or refresh='epoch'."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        FisherMask(nn.Linear(1, 1), keep, refresh="online", every=every, **options)


def mask_of(
    model: nn.Module,
    keep: float,
    schedule: Schedule,
    options: Mapping[str, Any],
    hidden: str = "",
    make: Callable[..., FisherMask] = FisherMask,
) -> tuple[FisherMask, Online | None]:
    """A mask, and what it collects if its schedule says so.

    Args:
        model: What is masked.
        keep: Share that learns.
        schedule: When.
        options: Options of `FisherMask`.
        hidden: What hides the layers from hooks, in words.
        make: Makes the mask of a model and options.

    Raises:
        OptionError: If layers are hidden that would be measured in training.
    """
    if not schedule.online:
        return make(model, keep=keep, **options), None
    if hidden:
        raise OptionError(
            f"refresh='online' cannot see the layers of {hidden}: use refresh='epoch', or leave "
            "torch.compile out, and start a process for each GPU (torchrun)."
        )
    mask = make(model, keep=keep, refresh="online", every=schedule.every, **options)
    return mask, Online(mask, schedule.every, options.get("group"))


class Online:
    """What one mask collects in the steps of a training that a callback follows.

    Hooks are on the model in training steps only: an error anywhere else leaves none.

    Args:
        mask: A mask with `refresh="online"`.
        every: One of so many batches is collected, the first after each refresh among them.
        group: Ranks that train the model together.
    """

    def __init__(self, mask: FisherMask, every: int, group: Any = None) -> None:
        self._mask, self._collector = mask, mask.collect(every=every)
        self._groups = data_groups(mask.model, group)
        self._first = True
        self._handle: Any = None

    def begin(self, *, redirected: bool = False) -> None:
        """Collect from here on.

        Args:
            redirected: The model's next call is not of its own `forward`, but of a method that
                calls that (Lightning's `training_step`, through a wrapper's `forward`).
        """
        if not redirected:
            self._collector.start()
        elif self._handle is None:
            # Hooks that are made in a call's own hooks are for the calls inside.
            self._handle = self._mask.model.register_forward_pre_hook(self._start)

    def end(self) -> None:
        """Collect no longer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._collector.stop()

    def check(self) -> None:
        """After the first step, say if nothing is collected.

        Raises:
            ModelError: If so.
        """
        if self._first and self._collector.empty:
            raise ModelError(
                f"Nothing was collected of the first step: training has no pass through "
                f"{type(self._mask.model).__name__}.forward, in train mode and followed by "
                "backward, or no batch of tensors in it. Name the submodule that is trained "
                "(model=..., in Lightning), or measure in passes of their own (refresh='epoch')."
            )
        self._first = False

    def refresh(self) -> None:
        """Make the mask of what was collected since the last time."""
        self._mask.refresh()
        self._collector.seen = 0

    def sha256(self) -> str:
        """SHA-256 of the mask and of its place in training, but not of what this rank collected."""
        state = self._collector.state_dict()
        self._collector.clear()
        try:
            return self._mask.sha256()
        finally:
            self._collector.load_state_dict(state)

    def gather(self) -> None:
        """Move what all ranks collected to the first, whose checkpoint then has all of it."""
        if not self._groups or not dist.is_initialized():
            return
        state = self._collector.state_dict()
        weight = torch.tensor(state["weight"], dtype=torch.float64, device="cpu")
        weight = sum_over(weight, self._groups)
        if weight:
            state["weight"] = float(weight)
            found = self._collector.diagonal(self._groups)
            state["sums"] = {name: f * weight.to(f) for name, f in found.items()}
            self._collector.load_state_dict(state)
            self.loaded()

    def loaded(self) -> None:
        """Leave to the first rank what a checkpoint had collected on all."""
        self._first = False
        if rank_and_world_size(self._groups)[0]:
            self._collector.clear()

    def _start(self, *_: Any) -> None:
        self._collector.start()
