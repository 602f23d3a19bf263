"""The state in which a model is measured; all is as before afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradmask.errors import ModelError
from gradmask.preserve import preserved
from gradmask.seeding import random_states_kept


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
        with random_state_kept(model):
            yield
    finally:
        torch.backends.cudnn.enabled = cudnn
        for module, training in modes.items():
            module.training = training


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Put back random states: PyTorch's, of the CPU and the model's GPUs, Python's and NumPy's."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with random_states_kept(), torch.random.fork_rng(devices=sorted(devices, key=str)):
        yield


@contextmanager
def measuring(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    loss: Any = None,
    *,
    mode: Callable[[nn.Module], AbstractContextManager[None]] = evaluation_mode,
) -> Iterator[None]:
    """Eval mode, gradients on, eager, and no hooks on parameters; all as before afterwards.

    Args:
        model: Any module.
        parameters: Its trainable parameters.
        loss: The loss, which may be a module too.
        mode: `random_state_kept` to leave the modes as they are.

    Raises:
        ModelError: If a BatchNorm layer would use batch statistics even in eval mode.
    """
    modules = [model, loss] if isinstance(loss, nn.Module) else [model]
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(preserved(module))
            stack.enter_context(mode(module))
        for context in (
            without_hooks(parameters),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            stack.enter_context(context)
        yield
