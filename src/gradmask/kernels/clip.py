"""Mask many tensors and scale them to a norm, in two readings and one writing."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradmask.kernels.gate import REALS, check_kept, pointers
from gradmask.kernels.library import load

_CHUNK = 16384  # as in clip_where.c


def clip_where(
    tensors: Sequence[Tensor], masks: Sequence[Tensor], most: float, *, finite: bool = False
) -> Tensor | None:
    """Mask tensors in place, and scale what is kept so that its Euclidean norm is at most `most`.

    As `keep_where` and then `torch.nn.utils.clip_grad_norm_`, on a CPU.

    Args:
        tensors: Tensors of one type, changed in place.
        masks: For each a bool tensor of its shape and device: True where it stays.
        most: The largest norm.
        finite: Raise an error if the norm is not finite.

    Returns:
        The norm before scaling, of what is kept; None, and nothing is changed, if there is no
        kernel for these.

    Raises:
        TypeError: As `keep_where`.
        ValueError: Likewise.
        RuntimeError: If the norm is not finite, and must be. Nothing is scaled then.
    """
    rows = check_kept(tensors, masks)
    dtypes = {t.dtype for t in tensors}
    dtype = dtypes.pop() if len(dtypes) == 1 and None not in rows else None
    library = load("clip_where.c", Real=REALS[dtype]) if dtype in REALS else None
    if library is None:
        return None
    count, sizes = len(tensors), [t.numel() for t in tensors]
    partial = (ctypes.c_double * sum(-(-size // _CHUNK) for size in sizes))()
    shared = ctypes.c_int64(count), (ctypes.c_int64 * count)(*sizes), pointers(tensors)
    threads = ctypes.c_int(torch.get_num_threads())
    library.sum_kept_squares(*shared, pointers(masks), partial, threads)
    found = math.fsum(partial) if all(map(math.isfinite, partial)) else float(sum(partial))
    found = math.sqrt(found)
    if finite and not math.isfinite(found):
        raise RuntimeError(
            f"The norm of the gradients is {found}, so they cannot be clipped: use a smaller "
            "learning rate, or error_if_nonfinite=False."
        )
    factor = found if math.isnan(found) else min(1.0, most / (found + 1e-6))
    library.scale_kept(*shared, pointers(masks), ctypes.c_double(factor), threads)
    torch.autograd.graph.increment_version(tensors)
    return torch.tensor(found, dtype=dtype, device="cpu")
