"""Sums of squared contractions: of per-sample weight gradients, which are never formed."""

from __future__ import annotations

import ctypes
import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from gradmask.kernels.gate import (
    REALS,
    Contraction,
    Places,
    check_apart,
    check_products,
    is_plain,
    pointer,
)
from gradmask.kernels.library import load


def can_add_squared_products(*tensors: Tensor) -> bool:
    """Whether `add_squared_products` works for tensors like these on this machine."""
    dtype, device = tensors[0].dtype, tensors[0].device
    if any(t.device != device or t.dtype != dtype or not is_plain(t) for t in tensors):
        return False
    if device.type == "cuda":
        return dtype == torch.float32 and _triton() is not None
    known = device.type == "cpu" and dtype in REALS
    return known and load("squared_products.c", Real=REALS[dtype]) is not None


def _triton() -> ModuleType | None:
    """The kernel for GPUs, if it is wanted and Triton is there."""
    if os.environ.get("GRADMASK_TRITON") != "1":
        return None
    try:
        return importlib.import_module("gradmask.kernels.triton_products")
    except ImportError:
        return None


def add_squared_products(
    total: Tensor, g: Tensor, x: Tensor, places: Places, sums: Tensor | None = None
) -> None:
    """Add squared per-sample contractions: total[k, d] += Σ_n (Σ_p g[n, k, p] · x_n[p + d])².

    Here x_n[p + d] is the element of sample n at `positions[p] + offsets[d]` in its memory: an
    unfolding that is read in place.

    Args:
        total: Shape (K, D), or (G, K, D) for G groups of channels; contiguous, changed in place.
        g: Shape (N, K, P), or (N, G, K, P); any strides.
        x: Samples in dimension 0, and groups in dimension 1; within these any strides.
        places: P positions and D offsets.
        sums: Like `total`: Σ_n Σ_p g[n, k, p] · x_n[p + d] is added to it; on CPUs only.

    Raises:
        TypeError: If a dtype is not one that the kernel has.
        ValueError: If shapes, strides or devices do not fit each other, a place lies outside of a
            sample, the total overlaps what is read, or there is no kernel for these here.
        MemoryError: If there is no memory for a copy of one sample's `g`.
    """
    if sums is not None:
        check_apart(total, sums)
        check_products(sums, g, x, places, written=True)
    work = check_products(total, g, x, places, written=True)
    if work is None:
        return
    if g.is_cuda and sums is None and can_add_squared_products(total, g, x):
        triton_products = _triton()
        assert triton_products is not None
        for group, total in enumerate(work.matrix):
            one = work._replace(matrix=total, g=work.g[:, group], x=work.x[:, group])
            triton_products.add_squared_products(one)
    else:
        _run(work, sums=sums)


def weigh_squared_products(weights: Tensor, g: Tensor, x: Tensor, places: Places) -> Tensor:
    """Weighted sum of each sample's squares: Σ_kd weights[k, d] · (Σ_p g[n, k, p] · x_n[p + d])².

    On CPUs only, otherwise as `add_squared_products`.

    Args:
        weights: Shape (K, D), or (G, K, D); contiguous.
        g: Shape (N, K, P), or (N, G, K, P); any strides.
        x: Samples in dimension 0, and groups in dimension 1; within these any strides.
        places: P positions and D offsets.

    Returns:
        Shape (N,), in float64.

    Raises:
        TypeError: As `add_squared_products`.
        ValueError: Likewise.
        MemoryError: If there is no memory for a copy of one sample's `g`.
    """
    work = check_products(weights, g, x, places, written=False)
    values = torch.zeros(len(g), dtype=torch.float64, device="cpu")
    if work is not None:
        _run(work, values=values)
    return values


def _run(work: Contraction, sums: Tensor | None = None, values: Tensor | None = None) -> None:
    matrix, g, x, positions, offsets = work
    library = load("squared_products.c", Real=REALS[g.dtype]) if g.is_cpu else None
    if library is None:
        raise ValueError(f"there is no kernel for {g.dtype} on {g.device} here")
    arguments = [
        *map(ctypes.c_int64, (*g.shape[:3], len(offsets), g.shape[3])),
        pointer(g),
        *map(ctypes.c_int64, g.stride()),
        pointer(x),
        *map(ctypes.c_int64, x.stride()[:2]),
        pointer(positions),
        pointer(offsets),
        pointer(matrix),
        None if sums is None else pointer(sums),
        None if values is None else pointer(values),
        ctypes.c_int(torch.get_num_threads()),
    ]
    if library.squared_products(*arguments):
        raise MemoryError("no memory for the squares of per-sample gradients")
