"""The trainable parameters of a model, and the state a measuring pass must not change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter

from gradmask.errors import ModelError


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return `{name: parameter}` of all parameters with `requires_grad`; tied ones appear once.

    Args:
        model: Any module.

    Returns:
        Trainable parameters under the first name that `model.named_parameters()` gives them.

    Raises:
        ModelError: If the model is scripted or frozen, or a lazy layer has no shape yet.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("The model is a ScriptModule, which takes no hooks: give the nn.Module.")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ModelError(
            "The model has no trainable parameters: set requires_grad=True on those that learn."
        )
    for name, parameter in parameters.items():
        if isinstance(parameter, UninitializedParameter):
            raise ModelError(f"Parameter {name!r} has no shape yet: run one batch first.")
    return parameters


@contextmanager
def without_hooks(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Keep hooks on parameters (`Tensor.register_hook`) out of gradients that are only measured.

    Args:
        parameters: The parameters; their hooks are back afterwards.
    """
    hooked = [p._backward_hooks for p in parameters if p._backward_hooks]
    found = [dict(hooks) for hooks in hooked]
    try:
        for hooks in hooked:
            hooks.clear()
        yield
    finally:
        for hooks, before in zip(hooked, found, strict=True):
            hooks.update(before)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; give every module its own mode back, and the random state.

    Per-sample gradients exist only where samples do not mix, so normalisation must use its
    running statistics, which eval mode also leaves unchanged.

    Args:
        model: Any module.

    Raises:
        ModelError: If a BatchNorm layer would use batch statistics even in eval mode.
    """
    modes = {module: module.training for module in model.modules()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    cudnn = torch.backends.cudnn.enabled
    try:
        model.eval()
        if any(isinstance(module, nn.RNNBase) for module in modes):
            # cuDNN differentiates recurrent layers in training mode only.
            torch.backends.cudnn.enabled = False
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                raise ModelError(
                    f"Layer {name!r} ({type(module).__name__}) normalises with batch statistics, "
                    "which mix the samples: per-sample gradients do not exist. Use running "
                    "statistics (track_running_stats=True, eval mode) or GroupNorm."
                )
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield
    finally:
        torch.backends.cudnn.enabled = cudnn
        for module, training in modes.items():
            module.training = training


@contextmanager
def measuring(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Eval mode, gradients on, eager, and no hooks on parameters; all as before afterwards.

    Args:
        model: Any module.
        parameters: Its trainable parameters.

    Raises:
        ModelError: If a BatchNorm layer would use batch statistics even in eval mode.
    """
    with (
        evaluation_mode(model),
        without_hooks(parameters),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),
    ):
        yield
