"""What a run is made of, from its options and seed: device, network, mask, monitor, optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gradmask import FisherMask, InfluenceMonitor
from gradmask.errors import OptionError
from gradmask.named import named
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.images import ImageData
from gradmask.recipes.identity import tensors_sum
from gradmask.recipes.training.models import build_model
from gradmask.recipes.training.sam import sam_backward
from gradmask.recipes.training.start import start_from
from gradmask.seeding import derive_seed, own_random_state
from gradmask.study import controls
from gradmask.study.arms import parse_arm

# Runs a network on a batch by a function that gives its loss, which is scaled before the backward
# pass; returns the loss, sets `.grad`.
Backward = Callable[[nn.Module, Callable[[], Tensor], Callable[[Tensor], Tensor]], Tensor]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def new_model(config: Comparison, data: ImageData, seed: int) -> nn.Module:
    """Build the network with the initial weights of a seed.

    Args:
        config: Options of the comparison.
        data: The run's images, for channels, size and number of classes.
        seed: Seed of the weights.

    Returns:
        The network on the CPU; the random states of PyTorch, NumPy and Python are unchanged.
    """
    _, channels, size, _ = data.train_images.shape
    classes = len(data.class_names)
    if ":" in config.model:
        named("model", config.model)  # first: a module may draw as it is imported
    with own_random_state(seed, "weights"):
        model = build_model(config, channels, size, classes)
    if config.weights is not None:
        start_from(Path(config.weights).expanduser(), model, classes)
    return model


def check_model(config: Comparison, data: ImageData, inputs: Tensor) -> nn.Module:
    """Build the network, and check that it can be compared.

    Args:
        config: Options of the comparison.
        data: The images.
        inputs: A few of them as the network sees them.

    Returns:
        The network.

    Raises:
        OptionError: If it does not give a number for each class, or starts otherwise each time.
    """
    model, again = (new_model(config, data, config.seeds[0]) for _ in range(2))
    with torch.no_grad():
        found = model.eval()(inputs)
    wanted = (len(inputs), len(data.class_names))
    if not isinstance(found, Tensor) or tuple(found.shape) != wanted:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise OptionError(
            f"model={config.model!r} must give one number for each of the {wanted[1]} classes, "
            f"{wanted} for {wanted[0]} images, and gives {shape}."
        )
    shared = {id(p) for p in model.parameters()} & {id(p) for p in again.parameters()}
    if shared or tensors_sum(model.state_dict()) != tensors_sum(again.state_dict()):
        raise OptionError(
            f"model={config.model!r} does not start alike each time: build a new network in each "
            "call, with random numbers of torch, numpy.random or random, which are seeded."
        )
    return model.train()


def new_mask(config: Comparison, model: nn.Module, arm: str, seed: int) -> FisherMask | None:
    """Build the mask of an arm, or what slows training in its place; None for all others."""
    config, found = config.for_arm(arm), parse_arm(arm)
    if found.strategy in ("none", "sam", "early"):
        return None
    return controls.new_mask(
        found,
        model,
        keep=config.keep,
        scope=config.scope,
        kind=config.fisher_kind,
        max_samples=config.fisher_samples,
        seed=seed,
    )


def new_backward(config: Comparison, arm: str) -> Backward:
    """How an arm's gradients are made from a function that gives the loss of a batch."""
    if parse_arm(arm).strategy == "sam":
        return partial(sam_backward, rho=config.for_arm(arm).rho)
    return _plain_backward


def _plain_backward(
    _model: nn.Module, loss: Callable[[], Tensor], scale: Callable[[Tensor], Tensor]
) -> Tensor:
    value = loss()
    scale(value).backward()
    return value.detach()


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The precision that a network runs in; float32 changes nothing."""
    dtype = _AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def new_scaler(config: Comparison, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling for `fp16`; for other precisions it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")


def check_together(config: Comparison, count: int) -> None:
    """Refuse ways to train that cannot work together, or here.

    Args:
        config: Options of the comparison.
        count: How many processes train.

    Raises:
        OptionError: If an option cannot work.
    """
    if count > 1 and config.engine == "fsdp":
        for name in ("compile", "channels_last"):
            if getattr(config, name):
                raise OptionError(f"{name} does not work with engine=fsdp: leave one out.")
        if config.precision == "fp16":
            raise OptionError("fp16 does not work with engine=fsdp: use bf16.")
        if any(parse_arm(arm).strategy == "sam" for arm in config.arms):
            raise OptionError("SAM needs whole gradients: use engine=ddp for arm 'sam'.")
        if config.monitor:
            raise OptionError("The influence monitor needs whole parameters: use engine=ddp.")
    if config.compile:
        try:
            torch.compile(torch.neg)(torch.ones(2, device=resolve_device(config.device)))
        except Exception as error:  # of many kinds: no compiler, no Triton, an old GPU
            reason = str(error).strip().splitlines()[0]
            raise OptionError(f"compile cannot work here: {reason}") from error


def new_monitor(
    config: Comparison,
    model: nn.Module,
    data: Iterable[tuple[Tensor, Tensor]],
    seed: int,
    steps: int,
) -> InfluenceMonitor | None:
    """Build the influence monitor of a run, if one is asked for.

    Args:
        config: Options of the comparison.
        model: The network to train.
        data: The training images as they are measured.
        seed: Seed of the choice of images.
        steps: Optimizer steps in an epoch.
    """
    if not config.monitor:
        return None
    return InfluenceMonitor(
        model,
        data,
        every=config.monitor_every or steps,
        sources=config.monitor_sources,
        probe=config.monitor_probe,
        methods=config.monitor,
        seed=derive_seed(seed, "monitor"),
        step=config.monitor_step,
        fisher=config.monitor_fisher,
    )


def new_optimizer(
    config: Comparison, model: nn.Module, steps: int
) -> tuple[Optimizer, LRScheduler]:
    """Build the optimizer and the learning-rate schedule of a comparison.

    Args:
        config: Options of the comparison.
        model: The network to train.
        steps: Optimizer steps in the whole run.

    Returns:
        Optimizer and schedule; the schedule is stepped after each batch.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    # One kernel for all parameters, which also unscales. On a CPU a step is 2 % of the work.
    fused = True if parameters[0].is_cuda else None
    optimizer: Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            parameters,
            config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov and config.momentum > 0,
            weight_decay=config.weight_decay,
            fused=fused,
        )
    else:
        optimizer = torch.optim.AdamW(
            parameters, config.lr, weight_decay=config.weight_decay, fused=fused
        )
    schedulers = torch.optim.lr_scheduler
    if config.schedule == "onecycle":
        return optimizer, schedulers.OneCycleLR(
            optimizer, config.lr, total_steps=steps, cycle_momentum=False
        )
    if config.schedule == "cosine":
        return optimizer, schedulers.CosineAnnealingLR(optimizer, steps)
    if config.schedule == "step":
        return optimizer, schedulers.StepLR(optimizer, math.ceil(steps / 3), gamma=0.1)
    return optimizer, schedulers.LambdaLR(optimizer, lambda _: 1.0)


def resolve_device(name: str) -> torch.device:
    """Find the device a comparison runs on.

    Args:
        name: `auto` (CUDA if there is any, else the CPU) or a name that PyTorch knows.

    Returns:
        The device.

    Raises:
        OptionError: If the name is unknown or the machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # which a meta tensor has no values for
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise OptionError(f"device={name!r} cannot be used here: {reason}") from error
    return device
