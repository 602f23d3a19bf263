"""Sums of squared contractions: of per-sample weight gradients, which are never formed."""

from __future__ import annotations

import ctypes
import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from gradmask.kernels.library import load, pointer

_REALS = {torch.float32: "float", torch.float64: "double"}


def can_add_squared_products(*tensors: Tensor) -> bool:
    """Whether `add_squared_products` works for tensors like these on this machine."""
    dtype, device = tensors[0].dtype, tensors[0].device
    if any(t.device != device or t.dtype != dtype for t in tensors):
        return False
    if device.type == "cuda":
        return dtype == torch.float32 and _triton() is not None
    known = device.type == "cpu" and dtype in _REALS
    return known and load("squared_products.c", Real=_REALS[dtype]) is not None


def _triton() -> ModuleType | None:
    """The kernel for GPUs, if it is wanted and Triton is there."""
    if os.environ.get("GRADMASK_TRITON") != "1":
        return None
    try:
        return importlib.import_module("gradmask.kernels.triton_products")
    except ImportError:
        return None


def add_squared_products(
    total: Tensor, g: Tensor, x: Tensor, positions: Tensor, offsets: Tensor
) -> None:
    """Add squared per-sample contractions: total[k, d] += Σ_n (Σ_p g[n, k, p] · x_n[p + d])².

    Here x_n[p + d] is the element of sample n at `positions[p] + offsets[d]` in its memory: an
    unfolding that is read in place.

    Args:
        total: Shape (K, D), contiguous; changed in place.
        g: Shape (N, K, P), any strides.
        x: Samples in dimension 0; within a sample any strides.
        positions: P integers, in elements from a sample's first.
        offsets: D integers, likewise.

    Raises:
        ValueError: If shapes do not fit each other, or a place lies outside of `x`.
        MemoryError: If there is no memory for a copy of one sample's `g`.
    """
    if not _fit(total, g, x, positions, offsets):
        return
    if g.is_cuda:
        triton_products = _triton()
        assert triton_products is not None
        triton_products.add_squared_products(total, g, x, positions, offsets)
        return
    _run(total, g, x, positions, offsets, None)


def weigh_squared_products(
    weights: Tensor, g: Tensor, x: Tensor, positions: Tensor, offsets: Tensor
) -> Tensor:
    """Weighted sum of each sample's squares: Σ_kd weights[k, d] · (Σ_p g[n, k, p] · x_n[p + d])².

    On CPUs only, otherwise as `add_squared_products`.

    Args:
        weights: Shape (K, D), contiguous.
        g: Shape (N, K, P), any strides.
        x: Samples in dimension 0; within a sample any strides.
        positions: P integers, in elements from a sample's first.
        offsets: D integers, likewise.

    Returns:
        Shape (N,), in float64.

    Raises:
        ValueError: If shapes do not fit each other, or a place lies outside of `x`.
        MemoryError: If there is no memory for a copy of one sample's `g`.
    """
    values = torch.zeros(len(g), dtype=torch.float64)
    if _fit(weights, g, x, positions, offsets):
        _run(weights, g, x, positions, offsets, values)
    return values


def _fit(matrix: Tensor, g: Tensor, x: Tensor, positions: Tensor, offsets: Tensor) -> bool:
    """Refuse what does not fit; False if there is nothing to do."""
    samples, outputs, places = g.shape
    if matrix.shape != (outputs, len(offsets)) or not matrix.is_contiguous():
        shape = outputs, len(offsets)
        raise ValueError(f"the total, or weights, must be contiguous and of shape {shape}")
    if len(positions) != places or len(x) != samples:
        raise ValueError("g, x and positions do not fit each other")
    if not (matrix.numel() and g.numel()):
        return False
    extent = sum((size - 1) * step for size, step in zip(x.shape[1:], x.stride()[1:], strict=True))
    first, last = (int(f(positions)) + int(f(offsets)) for f in (torch.min, torch.max))
    if first < 0 or last > extent:
        raise ValueError("positions and offsets reach beyond a sample")
    return True


def _run(
    matrix: Tensor,
    g: Tensor,
    x: Tensor,
    positions: Tensor,
    offsets: Tensor,
    values: Tensor | None,
) -> None:
    library = load("squared_products.c", Real=_REALS[g.dtype])
    assert library is not None
    positions, offsets = positions.contiguous(), offsets.contiguous()
    arguments = [
        *map(ctypes.c_int64, (*g.shape[:2], len(offsets), g.shape[2])),
        pointer(g),
        *map(ctypes.c_int64, g.stride()),
        pointer(x),
        ctypes.c_int64(x.stride(0)),
        pointer(positions),
        pointer(offsets),
        pointer(matrix),
        None if values is None else pointer(values),
        ctypes.c_int(torch.get_num_threads()),
    ]
    if library.squared_products(*arguments):
        raise MemoryError("no memory for the squares of per-sample gradients")
