"""A `LightningModule` that is measured beside its trainer."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradmask import FisherMask
from gradmask.errors import GradmaskError, ModelError, OptimizerError
from gradmask.integrations.lightning_ids import BatchIds

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def callback_class() -> type:
    """A class that is a `Callback` of both packages, which share nothing, where installed."""
    bases, failed = [], None
    for name in _PACKAGES:
        try:
            bases.append(importlib.import_module(name).Callback)
        except ImportError as error:
            failed = error
    if not bases:
        raise ImportError(
            "The callbacks for Lightning need it: pip install 'gradmask[lightning]'."
        ) from failed
    return type("Callback", tuple(bases), {})


def named_module(
    module: LightningModule, name: str | None, callback: str = "FisherMaskCallback"
) -> nn.Module:
    """What is measured and masked of a module.

    Args:
        module: The module.
        name: Of a submodule; None for the module itself.
        callback: Whose option the name is.

    Raises:
        ModelError: If there is none of that name, or it has no `forward`.
    """
    measured: nn.Module = module
    try:
        measured = module.get_submodule(name or "")
    except AttributeError as error:
        names = ", ".join(name for name, _ in module.named_children())
        raise ModelError(
            f"{type(module).__name__} has no submodule {name!r}: it has {names}."
        ) from error
    package = type(measured).forward.__module__.partition(".")[0]
    if package in ("lightning", "pytorch_lightning"):
        raise ModelError(
            f"{type(measured).__name__} has no forward to measure: define forward(inputs) -> "
            f"outputs, or name the submodule with {callback}(model=...)."
        )
    return measured


def optimizers_of(trainer: Trainer, mask: FisherMask) -> list[Any]:
    """The optimizers that hold parameters of what is masked.

    Args:
        trainer: The trainer.
        mask: The mask.

    Raises:
        OptimizerError: If there is none.
    """
    modules = [m for m in (mask.model, mask.loss) if isinstance(m, nn.Module)]
    own = {id(p) for module in modules for p in module.parameters()}
    found = [
        optimizer
        for optimizer in trainer.optimizers
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"])
    ]
    if not found:
        raise OptimizerError(
            f"No optimizer of configure_optimizers() holds parameters of "
            f"{type(mask.model).__name__}, which FisherMaskCallback is to mask."
        )
    return found


def prepared(
    trainer: Trainer, module: LightningModule, unpack: Any, batch: Any, *, trained: bool = True
) -> Any:
    """A batch as `training_step` gets it: its precision, device, and the user's hooks on it.

    Args:
        trainer: The trainer.
        module: The module that it trains.
        unpack: What the user has made of a batch, or None.
        batch: A batch of a loader.
        trained: The loader is the trainer's own.

    Returns:
        The batch.
    """
    with trainer_is(trainer, module):
        convert: Any = trainer.precision_plugin.convert_input
        if isinstance(convert, BatchIds):  # of a DynamicsCallback
            convert = convert.without if trained else convert.original
        batch = convert(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    return unpack(batch) if unpack else batch


@contextmanager
def trainer_is(trainer: Trainer | None, module: LightningModule) -> Iterator[None]:
    """Without its trainer a module logs nothing, and only the module itself is put back."""
    found = [(vars(m), vars(m)["_trainer"]) for m in module.modules() if "_trainer" in vars(m)]
    try:
        for attributes, _ in found:
            attributes["_trainer"] = trainer
        yield
    finally:
        for attributes, before in found:
            attributes["_trainer"] = before


@contextmanager
def forward_errors(module: nn.Module, batches: str) -> Iterator[None]:
    """Say of an error that the module's own `forward` raises why it was called.

    Args:
        module: What is measured.
        batches: Where its batches are from.

    Raises:
        ModelError: If the module's `forward` fails.
    """
    try:
        yield
    except (GradmaskError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        if not _raised_in(error, module):
            raise
        raise ModelError(
            f"FisherMaskCallback runs {type(module).__name__}.forward on the batches of {batches}, "
            f"and it failed ({error}). If training_step prepares them, or trains something else, "
            "say so: unpack=lambda batch: (inputs, targets), loss=..., or model='submodule'."
        ) from error


def _raised_in(error: Exception, module: nn.Module) -> bool:
    """Whether an error was raised in a call of this module."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    calls = [frame for frame in frames if frame.f_code.co_name == "_call_impl"]
    return any(frame.f_locals.get("self") is module for frame in calls)
