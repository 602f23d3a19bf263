"""What a training loss multiplies each sample's own loss by, seen in the gradient of the outputs.

A mean over samples or tokens, a part of an accumulated batch, and loss scaling are one factor c:
the gradient of the logits z is c (p − y) where the sample's own negative log-likelihood has p − y.
With one-hot labels y it can be read off: c = Σ_n −min_k ∂L/∂z_nk / Σ_n (1 − p_nk*).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SCALED = ("cross_entropy", "bernoulli")
_ROWS = 64  # distributions that are looked at


def logits_of(outputs: Any) -> Tensor | None:
    """The logits among what a model returned: itself, by that name, or the first; None if not."""
    if isinstance(outputs, Mapping):
        outputs = outputs.get("logits", list(outputs.values()))
    found = getattr(outputs, "logits", outputs)
    for tensor in found if isinstance(found, tuple | list) else (found,):  # a loss may be first
        if isinstance(tensor, Tensor) and tensor.grad_fn is not None and tensor.dim():
            return tensor if tensor.is_floating_point() else None
    return None


def before_casts(tensor: Tensor) -> tuple[Any, int]:
    """The node and the place of its outputs that a tensor is, but for casts to another type.

    A model's own loss is of what it had before its outputs were cast (Accelerate's autocast).

    Args:
        tensor: What has a graph.
    """
    node: Any = tensor.grad_fn
    place = tensor.output_nr
    while node.name() == "ToCopyBackward0" and node.next_functions[0][0] is not None:
        node, place = node.next_functions[0]
    return node, place


def loss_scale(logits: Tensor, gradient: Tensor, likelihood: str) -> Tensor:
    """The factor that every sample's own negative log-likelihood has in the loss.

    Args:
        logits: Shape (N, C, ...) or (N, ..., C) of `cross_entropy`, or log-probabilities; any of
            `bernoulli`.
        gradient: Of the loss, likewise.
        likelihood: `cross_entropy` or `bernoulli`.

    Returns:
        A scalar in float64, where the logits are; NaN if the gradient is not that of one factor
        and a label for each, perhaps smoothed (mixed labels, weights of classes, another loss).
    """
    kind = torch.promote_types(logits.dtype, torch.float32)
    if likelihood == "bernoulli":
        z, g = _some(logits.unsqueeze(-1), gradient.unsqueeze(-1), kind)
        p, up = z.sigmoid(), g > 0  # a label of 0
        sure = torch.where(up, p, 1 - p)
        size = g.abs()
        model = sure * g.sign()
    else:
        if gradient.dim() < 2:
            return gradient.new_full((), torch.nan, dtype=torch.float64)
        last = _classes(gradient)
        z, g = _some(logits.movedim(last, -1), gradient.movedim(last, -1), kind)
        label = g.argmin(1, keepdim=True)
        p = z.softmax(1).scatter(1, label, 0.0)
        sure = p.sum(1, keepdim=True)
        size = -g.gather(1, label)
        model = p.scatter(1, label, -sure)
    counts = (g.abs().amax(1, keepdim=True) > 0).to(kind)  # ignored ones have gradient zero
    scale = (size * counts).double().sum() / (sure * counts).double().sum()
    off = (g - scale.to(kind) * model * counts).double().norm()
    rough = 3e-2 if min(logits.itemsize, gradient.itemsize) < 4 else 1e-3
    rounded = 4 * torch.finfo(kind).eps * scale.abs() * len(g) ** 0.5  # of 1 - p
    found = torch.where(off <= rough * g.double().norm() + rounded, scale, torch.nan)
    if likelihood == "cross_entropy" and (g.is_cuda or rough > 1e-2 or found.isnan()):
        smoothed, left = _smoothed_scale(z, g, label, counts, rough)
        # Of hard labels it leaves as much: near uniform p the two are alike but for rounding.
        better = found.isnan() | (left < 0.5 * off)
        found = torch.where(better & ~smoothed.isnan(), smoothed, found)
        found = torch.where(found.isnan(), _log_scale(g, rough), found)
    return found


def _smoothed_scale(
    z: Tensor, g: Tensor, label: Tensor, counts: Tensor, rough: float
) -> tuple[Tensor, Tensor]:
    """The factor of smoothed labels, or NaN, and what is left unexplained.

    The gradient is c (p − ε/C), and at each label c (p − 1 + ε − ε/C).
    """
    p = z.double().softmax(1)
    rest = torch.ones_like(p).scatter(1, label, 0.0) * counts
    mean_p, mean_g = ((t * rest).sum() / rest.sum() for t in (p, g))
    slope = ((p - mean_p) * (g - mean_g) * rest).sum() / ((p - mean_p).square() * rest).sum()
    shift = mean_g - slope * mean_p  # -c ε/C
    at_label = shift - slope - shift * p.shape[1]
    model = (slope * p + shift).scatter(1, label, (slope * p.gather(1, label) + at_label)) * counts
    left = (g - model).norm()
    fits = (left <= rough * g.double().norm()) & (slope > 0) & (shift <= 0)
    return torch.where(fits, slope, torch.nan), left


def _log_scale(gradient: Tensor, rough: float) -> Tensor:
    """The factor of log-probabilities, whose gradient is -c at each label and else zero; or NaN."""
    labels = gradient < 0
    scale = -gradient.double().sum() / labels.sum()
    off = (gradient + scale.to(gradient) * labels).double().norm()
    return torch.where(off <= rough * gradient.double().norm(), scale, torch.nan)


def _classes(gradient: Tensor) -> int:
    """The dimension over which the gradient of a softmax's logits adds up to zero: 1 or -1."""
    if gradient.dim() == 2:
        return 1
    return min((-1, 1), key=lambda d: float(gradient.sum(d, dtype=torch.float32).norm()))


def _some(logits: Tensor, gradient: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of the last dimension: those with the largest gradients, which count, and others."""
    sizes = torch.linalg.vector_norm(gradient, torch.inf, dim=-1)
    if sizes.numel() <= _ROWS:
        return tuple(t.reshape(-1, t.shape[-1]).to(kind) for t in (logits, gradient))  # type: ignore[return-value]
    largest = sizes.flatten().topk(_ROWS // 2).indices
    spread = torch.arange(_ROWS // 2, device=sizes.device) * (sizes.numel() // (_ROWS // 2))
    rows = torch.unravel_index(torch.cat([largest, spread]), sizes.shape)
    return logits[rows].to(kind), gradient[rows].to(kind)
