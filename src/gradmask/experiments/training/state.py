"""Everything that a run changes as it trains, in one place that can be saved and gone on from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gradmask import FisherMask, InfluenceMonitor
from gradmask.experiments.config import Comparison
from gradmask.experiments.data.images import ImageData
from gradmask.experiments.training.components import (
    Backward,
    new_backward,
    new_mask,
    new_model,
    new_monitor,
    new_optimizer,
)
from gradmask.seeding import seeded_generator

_PARTS = ("model", "optimizer", "schedule", "mask", "monitor")
_GENERATORS = ("order", "augmentation")
_VALUES = ("lr", "epoch", "step", "rows", "seconds", "epoch_seconds")


@dataclass
class RunState:
    """The state of one run, at a moment between two optimizer steps.

    Attributes:
        model: The network.
        optimizer: Its optimizer.
        schedule: The learning-rate schedule.
        mask: The mask, if the arm has one.
        monitor: The influence monitor, if there is one.
        order: Generator of the images' order; during an epoch it stays as at the epoch's start.
        augmentation: Generator of the augmentation.
        backward: Makes the gradients.
        loss: Sum of the training loss over the epoch's images so far, float64.
        lr: Learning rate at the start of the epoch.
        epoch: The epoch in progress, or the next one, counted from 1.
        step: Optimizer steps of the epoch so far.
        rows: Measurements of each epoch so far.
        seconds: Time the run has taken.
        epoch_seconds: Time that training in this epoch has taken.
    """

    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    mask: FisherMask | None
    monitor: InfluenceMonitor | None
    order: torch.Generator
    augmentation: torch.Generator
    backward: Backward
    loss: Tensor
    lr: float
    epoch: int = 1
    step: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    epoch_seconds: float = 0.0

    def next_epoch(self) -> None:
        """The epoch is over."""
        self.epoch += 1
        self.step = 0
        self.lr = float(self.schedule.get_last_lr()[0])
        self.epoch_seconds = 0.0
        self.loss.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors that load without pickle; PyTorch's random states with them."""
        parts = {name: getattr(self, name) for name in _PARTS}
        state = {name: p.state_dict() for name, p in parts.items() if p is not None}
        state |= {name: getattr(self, name).get_state() for name in _GENERATORS}
        state |= {name: getattr(self, name) for name in _VALUES}
        state |= {"loss": self.loss, "random": torch.get_rng_state()}
        if self.loss.is_cuda:
            state["cuda_random"] = torch.cuda.get_rng_state(self.loss.device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, PyTorch's random states included.

        Args:
            state: What `state_dict` returned, in a run of the same options, arm and seed; the
                device may be another.
        """
        for name in _PARTS:
            if name in state:
                getattr(self, name).load_state_dict(state[name])
        for name in _GENERATORS:
            getattr(self, name).set_state(state[name])
        for name in _VALUES:
            setattr(self, name, state[name])
        self.loss.copy_(state["loss"])
        torch.set_rng_state(state["random"])
        if self.loss.is_cuda and "cuda_random" in state:
            torch.cuda.set_rng_state(state["cuda_random"], self.loss.device)


def new_state(
    config: Comparison,
    data: ImageData,
    arm: str,
    seed: int,
    train_set: Iterable[tuple[Tensor, Tensor]],
    steps: int,
) -> RunState:
    """Build what a run is made of, as it is before the first step.

    Args:
        config: Options of the arm.
        data: The run's images, on the device it trains on.
        arm: The arm.
        seed: Seed of the run.
        train_set: The training images as they are measured.
        steps: Optimizer steps in an epoch.

    Returns:
        The state; the mask is attached to the optimizer.
    """
    device = data.train_images.device
    model = new_model(config, data, seed).to(device)
    optimizer, schedule = new_optimizer(config, model, steps * config.epochs)
    mask = new_mask(config, model, arm, seed)
    if mask is not None:
        mask.attach(optimizer)
    return RunState(
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        mask=mask,
        monitor=new_monitor(config, model, train_set, seed, steps),
        order=seeded_generator(seed, "order"),
        augmentation=seeded_generator(seed, "augmentation"),
        backward=new_backward(config, arm),
        loss=torch.zeros((), dtype=torch.float64, device=device),
        lr=float(schedule.get_last_lr()[0]),
    )
