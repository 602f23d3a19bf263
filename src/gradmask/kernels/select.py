"""Keep some entries of many tensors and replace the others, in one reading."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from gradmask.kernels.gate import Row, check_kept, pointers
from gradmask.kernels.library import load


def keep_where(
    tensors: Sequence[Tensor], masks: Sequence[Tensor], others: Sequence[Tensor] | None = None
) -> None:
    """Replace, in place, the entries outside of masks: by 0, or by those of other tensors.

    Not a product: an infinite entry times 0 would be NaN.

    Args:
        tensors: Tensors of any types and devices, changed in place.
        masks: For each a bool tensor of its shape and device: True where it stays as it is.
        others: For each a tensor of its shape, type and device (default: zeros).

    Raises:
        TypeError: If something is no tensor, or of another type. Nothing is changed yet.
        ValueError: If numbers, shapes or devices differ, or a tensor overlaps itself; likewise.
    """
    columns = [tensors, masks] if others is None else [tensors, masks, others]
    for word, rows in check_kept(*columns).items():
        library = load("keep_where.c", Word=word) if word else None
        if library is None:
            for row in rows:
                _keep_where(*row)
        else:
            _keep_natively(library, rows)


def _keep_where(tensor: Tensor, mask: Tensor, other: Tensor | None = None) -> None:
    if other is None:
        tensor.masked_fill_(~mask, 0)
    else:
        tensor.copy_(torch.where(mask, tensor, other))


def _keep_natively(library: ctypes.CDLL, rows: Sequence[Row]) -> None:
    count = len(rows)
    tensors, masks, *others = zip(*rows, strict=True)
    library.keep_where(
        ctypes.c_int64(count),
        (ctypes.c_int64 * count)(*map(Tensor.numel, tensors)),
        pointers(tensors),
        pointers(masks),
        pointers(others[0]) if others else None,
        ctypes.c_int(torch.get_num_threads()),
    )
    torch.autograd.graph.increment_version(tensors)
