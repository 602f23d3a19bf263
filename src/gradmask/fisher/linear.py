"""Linear layers over any positions: per-sample gradients, and cheaper ways to what is wanted."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from gradmask.fisher.rules import Product, add_squares, chunk_size, register_rule, trains
from gradmask.kernels import (
    Places,
    add_squared_products,
    can_add_squared_products,
    weigh_squared_products,
)

# From these sizes on, a linear layer's gradients are faster formed one after the other on a CPU
# than by the kernel that forms none (docs/performance.md).
LOOP_POSITIONS = 64
LOOP_ELEMENTS = 1 << 16


def tokens_of(tensor: Tensor) -> Tensor:
    """Fold all dimensions between the samples and the features into one."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def add_linear_squares(total: Tensor, x: Tensor, g: Tensor, sums: Tensor | None = None) -> None:
    """Add Σ_n (Σ_p g[n, p, k] · x[n, p, d])² to total[k, d], the fastest way there is.

    Args:
        total: Shape (K, D), changed in place.
        x: Inputs, shape (N, P, D), any strides.
        g: Gradients of the outputs, shape (N, P, K), any strides.
        sums: Like `total`: Σ_n Σ_p g[n, p, k] · x[n, p, d] is added to it.
    """
    small = x.shape[1] > 1 and not _is_large(total, x)
    if small and not (x.is_cuda and sums is not None) and can_add_squared_products(total, g, x):
        add_squared_products(total, g.mT, x, _places(x.shape[1:], x.stride()[1:]), sums)
        return
    if x.shape[1] == 1:
        total.addmm_(g[:, 0].square().t(), x[:, 0].square())
    elif x.is_cuda:
        chunk = chunk_size([total])
        for xp, gp in zip(x.split(chunk), g.split(chunk), strict=True):
            add_squares(total, gp.mT @ xp, spare=True)
    else:
        for xn, gn in zip(x, g, strict=True):  # one gradient stays in cache between its uses
            gradient = gn.t() @ xn
            total.addcmul_(gradient, gradient)
            if sums is not None:
                sums += gradient
        return
    if sums is not None:
        sums.addmm_(g.flatten(0, 1).t(), x.flatten(0, 1))


@lru_cache(maxsize=1024)
def _places(sizes: tuple[int, int], steps: tuple[int, int]) -> Places:
    """Positions and features in a sample's memory."""
    positions, features = (
        torch.arange(size, device="cpu") * step for size, step in zip(sizes, steps, strict=True)
    )
    return Places(positions, features)


def _is_large(total: Tensor, x: Tensor) -> bool:
    """Whether the product of one sample's matrices is large enough to be fast by itself."""
    return x.shape[1] >= LOOP_POSITIONS and total.numel() >= LOOP_ELEMENTS and not x.is_cuda


def _add_linear_squares(
    module: nn.Module,
    x: Tensor,
    g: Tensor,
    totals: dict[str, Tensor],
    sums: dict[str, Tensor] | None = None,
) -> None:
    x, g = tokens_of(x), tokens_of(g)
    sums = sums or {}
    if "weight" in totals:
        add_linear_squares(totals["weight"], x, g, sums.get("weight"))
    if "bias" in totals:
        totals["bias"] += g.sum(1).square_().sum(0)
    if "bias" in sums:
        sums["bias"] += g.sum((0, 1))


def _weigh_linear_squares(
    module: nn.Module, x: Tensor, g: Tensor, weights: dict[str, Tensor]
) -> Tensor | None:
    x, g = tokens_of(x), tokens_of(g)
    values = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    if "weight" in weights:
        weight = weights["weight"]
        if g.shape[1] == 1:  # rank one, as above
            values += ((g[:, 0].square() @ weight) * x[:, 0].square()).sum(1)
        elif not (x.is_cuda or _is_large(weight, x)) and can_add_squared_products(weight, g, x):
            values += weigh_squared_products(weight, g.mT, x, _places(x.shape[1:], x.stride()[1:]))
        else:
            return None
    if "bias" in weights:
        values += g.sum(1).square_() @ weights["bias"]
    return values


def _as_linear_product(module: nn.Module, x: Tensor, g: Tensor) -> Product:
    return Product(tokens_of(g).mT, tokens_of(x).mT, lambda inputs: inputs)


@register_rule(
    nn.Linear,
    add_squares=_add_linear_squares,
    weigh_squares=_weigh_linear_squares,
    as_product=_as_linear_product,
    add_moments=_add_linear_squares,
)
def linear(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Σ_t g_t x_tᵀ over the positions t; input (N, ..., in), output gradient (N, ..., out)."""
    x, g = tokens_of(x), tokens_of(g)
    out = {}
    if trains(module, "weight"):
        out["weight"] = g.transpose(1, 2) @ x
    if trains(module, "bias"):
        out["bias"] = g.sum(1)
    return out
