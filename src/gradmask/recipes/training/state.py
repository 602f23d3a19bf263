"""Everything that a run changes as it trains, in one place that can be saved and gone on from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gradmask import FisherMask, InfluenceMonitor
from gradmask.audit import Dynamics
from gradmask.distributed import is_sharded
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.images import ImageData
from gradmask.recipes.training.components import (
    Backward,
    new_backward,
    new_mask,
    new_model,
    new_monitor,
    new_optimizer,
    new_scaler,
)
from gradmask.recipes.training.engines import distribute
from gradmask.seeding import seeded_generator
from gradmask.study.world import World, current_world

_PARTS = ("model", "optimizer", "schedule", "scaler", "mask", "monitor", "dynamics")
_IN_SHARDS = ("model", "optimizer", "mask")  # with `fully_shard`
_GENERATORS = ("order", "augmentation")
_VALUES = ("lr", "epoch", "step", "rows", "seconds", "epoch_seconds")


@dataclass
class RunState:
    """The state of one run, at a moment between two optimizer steps.

    Attributes:
        model: The network.
        trained: What is called in training: the network as the processes share it.
        world: This process among those that train.
        optimizer: Its optimizer.
        schedule: The learning-rate schedule.
        scaler: Loss scaling, which does nothing but for `fp16`.
        mask: The mask, if the arm has one.
        monitor: The influence monitor, if there is one.
        dynamics: What training says of each of its images.
        order: Generator of the images' order; during an epoch it stays as at the epoch's start.
        augmentation: Generator of the augmentation.
        backward: Makes the gradients.
        loss: Sum of the training loss over this process's images of the epoch so far, float64.
        lr: Learning rate at the start of the epoch.
        epoch: The epoch in progress, or the next one, counted from 1.
        step: Optimizer steps of the epoch so far.
        rows: Measurements of each epoch so far.
        seconds: Time the run has taken.
        epoch_seconds: Time that training in this epoch has taken.
    """

    model: nn.Module
    trained: nn.Module
    world: World
    optimizer: Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    mask: FisherMask | None
    monitor: InfluenceMonitor | None
    dynamics: Dynamics
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

    @property
    def in_shards(self) -> bool:
        """Whether every process has a part of each parameter."""
        return any(is_sharded(p) for p in self.model.parameters())

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors that load without pickle; PyTorch's random states with them.

        Every process must call it. Without what is in shards, which `shards` gives.
        """
        self.dynamics.gather()
        names = [name for name in _PARTS if not (self.in_shards and name in _IN_SHARDS)]
        parts = {name: getattr(self, name) for name in names}
        state = {name: p.state_dict() for name, p in parts.items() if p is not None}
        if self.in_shards and self.mask is not None:
            state["mask"] = self.mask.state_dict() | {"masks": {}}
        state |= {name: getattr(self, name).get_state() for name in _GENERATORS}
        state |= {name: getattr(self, name) for name in _VALUES}
        own = {"loss": self.loss.cpu(), "random": torch.get_rng_state()}
        if self.loss.is_cuda:
            own["cuda_random"] = torch.cuda.get_rng_state(self.loss.device)
        return state | {"processes": self.world.gather(own)}

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers, whole, in the main process; every process must call it."""
        if not self.in_shards:
            return self.model.state_dict()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole: dict[str, Any] = get_model_state_dict(self.model, options=options)
        return whole

    def shards(self) -> dict[str, Any]:
        """DTensors of network, optimizer and mask, in nested dicts."""
        self.world.same_buffers(self.model)  # or those of any process might be saved
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        if self.mask is not None and self.mask.masks:
            state["masks"] = self.mask.state_dict()["masks"]
        return state

    def empty_shards(self, state: dict[str, Any]) -> dict[str, Any]:
        """What `shards` returned at the time of a saved state, to be filled with its values.

        Args:
            state: The state.
        """
        found = self.shards()
        if self.mask is not None and state["mask"]["refreshes"]:
            found["masks"] = {
                name: torch.zeros_like(p, dtype=torch.bool)
                for name, p in self.model.named_parameters()
                if p.requires_grad
            }
        return found

    def load_state_dict(self, state: dict[str, Any], shards: dict[str, Any] | None = None) -> None:
        """Go on from a saved state, PyTorch's random states included.

        Args:
            state: What `state_dict` returned, in a run of the same options, arm and seed; device
                and number of processes may be others.
            shards: What `shards` returned then, if the parameters are in shards.
        """
        # As this device has it, not the one that saved; `set_state_dict` replaces it as well.
        fused = [group["fused"] for group in self.optimizer.param_groups]
        if shards is not None:
            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=shards["model"],
                optim_state_dict=shards["optimizer"],
            )
            if self.mask is not None:
                state["mask"]["masks"] = shards.get("masks", {})
        for name in _PARTS:
            if name in state:
                getattr(self, name).load_state_dict(state[name])
        for group, own in zip(self.optimizer.param_groups, fused, strict=True):
            group["fused"] = own
        for name in _GENERATORS:
            getattr(self, name).set_state(state[name])
        for name in _VALUES:
            setattr(self, name, state[name])
        own = state["processes"]
        if len(own) == self.world.size:
            self.loss.copy_(own[self.world.rank]["loss"])
        elif self.world.is_main:
            self.loss.copy_(torch.stack([part["loss"] for part in own]).sum())
        if self.world.rank < len(own):
            own = own[self.world.rank]
            torch.set_rng_state(own["random"])
            if self.loss.is_cuda and "cuda_random" in own:
                torch.cuda.set_rng_state(own["cuda_random"], self.loss.device)


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
    device = data.train_labels.device
    model = new_model(config, data, seed).to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    world = current_world()
    shared = distribute(model, config.engine) if world.size > 1 else model
    # Not `shared.compile()`, which older versions of torch ignore for an nn.Sequential.
    trained: Any = torch.compile(shared) if config.compile else shared
    optimizer, schedule = new_optimizer(config, model, steps * config.epochs)
    mask = new_mask(config, shared, arm, seed)
    if mask is not None:
        mask.attach(optimizer)
    return RunState(
        model=model,
        trained=trained,
        world=world,
        optimizer=optimizer,
        schedule=schedule,
        scaler=new_scaler(config, device),
        mask=mask,
        monitor=new_monitor(config, model, train_set, seed, steps),
        dynamics=Dynamics(len(data.train_labels)),
        order=seeded_generator(seed, "order"),
        augmentation=seeded_generator(seed, "augmentation"),
        backward=new_backward(config, arm),
        loss=torch.zeros((), dtype=torch.float64, device=device),
        lr=float(schedule.get_last_lr()[0]),
    )
