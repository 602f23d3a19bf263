"""Convolutions of any dimension: per-sample weight gradients, and four methods for their squares.

The kernel for squared products forms no per-sample gradient at all and is the fastest where it can
be had. Without it: a loop over samples costs a call for each; one convolution with a group for each
sample costs none, but is slow for large weights; unfolding turns all into a product of matrices,
which GPUs do well. Which is fastest depends on the weight's shape (`gradmask bench layers`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gradmask.fisher.rules import Product, add_squares, chunk_size, register_rule, trains
from gradmask.kernels import (
    Places,
    add_squared_products,
    can_add_squared_products,
    weigh_squared_products,
)

# Above this many entries a weight gradient per group is slower than one per call (on CPUs).
GROUPED_ELEMENTS = 1 << 18
# With fewer outputs in a group, and inputs that are no neighbours, the kernel's vectors are empty.
VECTOR_OUTPUTS, VECTOR_INPUTS = 8, 3

Method = Callable[[_ConvNd, Tensor, Tensor, Tensor], None]


def weight_gradient(module: _ConvNd, x: Tensor, g: Tensor, samples: int = 1) -> Tensor:
    """Weight gradients of `samples` equal parts of the channels, each a group of its own.

    Args:
        module: The layer.
        x: Input, shape (1, samples * C, ...), padded already where the layer's own mode asks.
        g: Gradient of the output, shape (1, samples * K, ...).
        samples: Samples laid out along the channels.

    Returns:
        Shape (samples, *weight.shape).
    """
    shape = module.weight.shape
    gradients = torch.ops.aten.convolution_backward(
        g,
        x,
        g.new_empty(samples * shape[0], *shape[1:]),  # read for its shape only
        None,
        module.stride,
        (0,) * len(module.kernel_size) if _pads_itself(module) else module.padding,
        module.dilation,
        module.transposed,
        module.output_padding,
        samples * module.groups,
        [False, True, False],
    )
    return gradients[1].view(samples, *shape)  # type: ignore[no-any-return]


def _pads_itself(module: _ConvNd) -> bool:
    return isinstance(module.padding, str) or module.padding_mode != "zeros"


def _padded(module: _ConvNd, x: Tensor) -> Tensor:
    if not _pads_itself(module):
        return x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, module._reversed_padding_repeated_twice, mode=mode)


Grid = tuple[tuple[int, ...], tuple[int, ...]]  # sizes, and a step for each dimension


@lru_cache(maxsize=1024)
def _places(positions: Grid, offsets: Grid) -> Places:
    return Places(_points(*positions), _points(*offsets))


def _points(sizes: Sequence[int], steps: Sequence[int]) -> Tensor:
    """Where the points of a grid lie, in order."""
    places = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, step in zip(sizes, steps, strict=True):
        places = (places[:, None] + torch.arange(size, device="cpu") * step).flatten()
    return places


def _contraction(
    module: _ConvNd, x: Tensor, g: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor, Tensor, Places]:
    """What the kernels for squared products work on: `matrix` and the others by groups.

    The weight gradient of a transposed convolution is that of a convolution from its output to
    its input.
    """
    still, moving = (x, g) if module.transposed else (g, x)
    if module.transposed or not _pads_itself(module):
        if any(module._reversed_padding_repeated_twice):
            moving = F.pad(moving, module._reversed_padding_repeated_twice)
    else:
        moving = _padded(module, moving)
    if module.groups > 1:
        moving = moving.contiguous()  # a group's pixels lie side by side
    channel, *steps = moving.stride()[1:]
    strides = [a * b for a, b in zip(module.stride, steps, strict=True)]
    dilations = [a * b for a, b in zip(module.dilation, steps, strict=True)]
    positions = tuple(still.shape[2:]), tuple(strides)
    places = _places(positions, (tuple(matrix.shape[1:]), (channel, *dilations)))
    groups = module.groups, -1
    outputs, inputs = still.flatten(2).unflatten(1, groups), moving.unflatten(1, groups)
    return _by_group(module, matrix), outputs, inputs, places


def _by_group(module: _ConvNd, matrix: Tensor) -> Tensor:
    """A tensor of the weight's shape as (groups, outputs, inputs)."""
    grouped: Tensor = matrix.flatten(1).unflatten(0, (module.groups, -1))
    return grouped


def add_by_products(
    module: _ConvNd, x: Tensor, g: Tensor, total: Tensor, sums: Tensor | None = None
) -> None:
    """Add the squares by the kernel that forms no per-sample gradient."""
    sums = None if sums is None else _by_group(module, sums)
    add_squared_products(*_contraction(module, x, g, total), sums)


def by_groups(module: _ConvNd, x: Tensor, g: Tensor) -> Tensor:
    """Per-sample weight gradients (N, *weight.shape) by one convolution with N times the groups."""
    x = _padded(module, x)
    n, inside, outside = len(x), x.shape[2:], g.shape[2:]
    return weight_gradient(module, x.reshape(1, -1, *inside), g.reshape(1, -1, *outside), n)


def by_unfolding(module: nn.Conv2d, x: Tensor, g: Tensor) -> Tensor:
    """Per-sample weight gradients (N, *weight.shape) as products of matrices."""
    deltas = g.flatten(2).unflatten(1, (module.groups, -1))
    gradients: Tensor = deltas @ _unfold(module, x).mT
    return gradients.reshape(len(x), *module.weight.shape)


def add_by_groups(module: _ConvNd, x: Tensor, g: Tensor, total: Tensor) -> None:
    """Add the squares, some samples at a time."""
    chunk = chunk_size([module.weight])
    parts = zip(x.split(chunk), g.split(chunk), strict=True)
    for xp, gp in parts:
        add_squares(total, by_groups(module, xp, gp), spare=True)


def add_by_samples(module: _ConvNd, x: Tensor, g: Tensor, total: Tensor) -> None:
    """Add the squares, one sample at a time: its gradient is still in cache when squared."""
    x = _padded(module, x)
    for n in range(len(x)):
        gradient = weight_gradient(module, x[n : n + 1], g[n : n + 1])[0]
        total.addcmul_(gradient, gradient)


def add_by_unfolding(module: _ConvNd, x: Tensor, g: Tensor, total: Tensor) -> None:
    """Add the squares of δᵀ·unfold(x), a product of matrices for each sample; for Conv2d."""
    assert isinstance(module, nn.Conv2d)
    flat = total.view(module.groups, len(total) // module.groups, -1)
    deltas = g.flatten(2).unflatten(1, (module.groups, -1))  # (n, groups, K / groups, positions)
    largest = max(module.weight.numel(), deltas[0, 0].shape[-1] * flat.shape[-1] * module.groups)
    chunk = max(1, chunk_size([module.weight]) * module.weight.numel() // largest)
    gradient = torch.empty_like(flat[0])
    for start in range(0, len(x), chunk):
        patches = _unfold(module, x[start : start + chunk])
        delta = deltas[start : start + chunk]
        if chunk > 1:
            add_squares(flat, delta @ patches.mT, spare=True)
        elif module.groups == 1:  # one large gradient, written to the same place each time
            torch.mm(delta[0, 0], patches[0, 0].t(), out=gradient)
            flat[0].addcmul_(gradient, gradient)
        else:
            flat += (delta[0] @ patches[0].mT).square_()


def _unfold(module: nn.Conv2d, x: Tensor) -> Tensor:
    """Patches, shape (n, groups, C / groups * kernel, positions)."""
    padding = (0, 0) if _pads_itself(module) else module.padding
    assert not isinstance(padding, str)
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    x = _padded(module, x)
    if x.is_cuda:  # PyTorch's own way launches a kernel for each sample
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        patches = patches_of(x, kernel, dilation, stride).flatten(4).flatten(1, 3)
    else:
        patches = F.unfold(x, kernel, dilation, padding, stride)
    split: Tensor = patches.unflatten(1, (module.groups, -1))
    return split


def patches_of(
    x: Tensor, kernel: Sequence[int], dilation: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """A view of all patches of padded images (n, C, H, W): shape (n, C, *kernel, *positions)."""
    steps = x.stride()[2:]
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    sizes = [(a - r) // s + 1 for a, r, s in zip(x.shape[2:], reach, stride, strict=True)]
    inner = [step * d for step, d in zip(steps, dilation, strict=True)]
    outer = [step * s for step, s in zip(steps, stride, strict=True)]
    shape = (*x.shape[:2], *kernel, *sizes)
    return x.as_strided(shape, (*x.stride()[:2], *inner, *outer))


METHODS: tuple[Method, ...] = (add_by_products, add_by_groups, add_by_unfolding, add_by_samples)


def fastest_method(module: _ConvNd, x: Tensor, g: Tensor, total: Tensor) -> Method:
    """Which of the methods to take, by the weight's shape and the device."""
    outputs = len(total) // module.groups
    fills = outputs >= VECTOR_OUTPUTS or module.kernel_size[-1] >= VECTOR_INPUTS
    if fills and can_add_squared_products(total, x, g):
        return add_by_products
    if module.weight.numel() <= GROUPED_ELEMENTS and not x.is_cuda:
        return add_by_groups
    return add_by_unfolding if isinstance(module, nn.Conv2d) else add_by_samples


def _add_squares(
    module: nn.Module,
    x: Tensor,
    g: Tensor,
    totals: dict[str, Tensor],
    sums: dict[str, Tensor] | None = None,
) -> None:
    assert isinstance(module, _ConvNd)
    sums = sums or {}
    if "weight" in totals:
        total, plain = totals["weight"], sums.get("weight")
        method = fastest_method(module, x, g, total)
        if method is add_by_products and not x.is_cuda:
            add_by_products(module, x, g, total, plain)
        else:
            method(module, x, g, total)
            if plain is not None:
                plain += weight_gradient(module, _padded(module, x), g)[0]
    if "bias" in totals:
        gradients = g.flatten(2).sum(2)
        if "bias" in sums:
            sums["bias"] += gradients.sum(0)
        totals["bias"] += gradients.square_().sum(0)


def _weigh_squares(
    module: nn.Module, x: Tensor, g: Tensor, weights: dict[str, Tensor]
) -> Tensor | None:
    assert isinstance(module, _ConvNd)
    values = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    if "weight" in weights:
        weight = weights["weight"]
        if x.is_cuda or fastest_method(module, x, g, weight) is not add_by_products:
            return None
        values += weigh_squared_products(*_contraction(module, x, g, weight))
    if "bias" in weights:
        values += g.flatten(2).sum(2).square_() @ weights["bias"]
    return values


def _as_product(module: nn.Module, x: Tensor, g: Tensor) -> Product | None:
    if not isinstance(module, nn.Conv2d) or module.groups > 1:
        return None
    return Product(g.flatten(2), x, lambda inputs: _unfold(module, inputs)[:, 0])


@register_rule(
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    add_squares=_add_squares,
    weigh_squares=_weigh_squares,
    as_product=_as_product,
    add_moments=_add_squares,
)
def convolution(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Per-sample gradients; input (N, C, ...), output gradient (N, K, ...)."""
    assert isinstance(module, _ConvNd)
    out = {}
    if trains(module, "weight"):
        large = module.weight.numel() > GROUPED_ELEMENTS
        if isinstance(module, nn.Conv2d) and large and g.shape[2:].numel() <= g.shape[1]:
            out["weight"] = by_unfolding(module, x, g)
        else:
            out["weight"] = by_groups(module, x, g)
    if trains(module, "bias"):
        out["bias"] = g.flatten(2).sum(2)
    return out
