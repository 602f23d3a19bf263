"""Sharpness-aware minimisation, a regulariser to compare the mask with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def sam_backward(
    model: nn.Module,
    loss: Callable[[], Tensor],
    scale: Callable[[Tensor], Tensor],
    rho: float,
) -> Tensor:
    """Gradients at θ + ρ g / ‖g‖, where g = ∇L(θ), in place of those at θ.

    P. Foret et al., "Sharpness-aware minimization for efficiently improving generalization",
    equation 2 and algorithm 1; ‖g‖ is over all parameters together. Running statistics are those of
    the pass at θ.

    Args:
        model: The network, with no gradients yet; its weights are as before afterwards.
        loss: Runs the network on the batch and gives its mean loss.
        scale: Scales the loss before a backward pass, which g / ‖g‖ does not depend on.
        rho: Radius ρ.

    Returns:
        The loss at θ, without a graph. The gradients are in `.grad`.
    """
    value = loss()
    scale(value).backward()
    moved = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    before = [p.detach().clone() for p, _ in moved]
    buffers = [b.clone() for b in model.buffers()]
    with torch.no_grad():
        norm = torch.stack([g.norm() for _, g in moved]).norm()
        length = rho / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        for p, g in moved:
            p.add_(g * length)
            p.grad = None
    scale(loss()).backward()
    with torch.no_grad():
        for (p, _), old in zip(moved, before, strict=True):
            p.copy_(old)  # exactly as it was, which subtracting would not be
        for buffer, old in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(old)
    return value.detach()
