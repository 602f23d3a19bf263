"""Keep some entries of many tensors and replace the others, in one reading."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from gradmask.kernels.library import load

_WORDS = {2: "uint16_t", 4: "uint32_t", 8: "uint64_t"}

Triple = tuple[Tensor, Tensor, Tensor | None]


def keep_where(
    tensors: Sequence[Tensor], masks: Sequence[Tensor], others: Sequence[Tensor] | None = None
) -> None:
    """Replace, in place, the entries outside of masks: by 0, or by those of other tensors.

    Not a product: an infinite entry times 0 would be NaN.

    Args:
        tensors: Tensors of any types and devices, changed in place.
        masks: For each a bool tensor of its shape and device: True where it stays as it is.
        others: For each a tensor of its shape, type and device (default: zeros).
    """
    native: dict[ctypes.CDLL, list[Triple]] = defaultdict(list)
    replacements = others if others is not None else [None] * len(tensors)
    for triple in zip(tensors, masks, replacements, strict=True):
        library = _library(*triple)
        if library is not None:
            native[library].append(triple)
        elif triple[2] is None:
            triple[0].masked_fill_(~triple[1], 0)
        else:
            triple[0].copy_(torch.where(triple[1], triple[0], triple[2]))
    for library, triples in native.items():
        count = len(triples)
        columns = list(zip(*triples, strict=True))[: 2 if others is None else 3]
        addresses = [(ctypes.c_void_p * count)(*(t.data_ptr() for t in c)) for c in columns]
        library.keep_where(
            ctypes.c_int64(count),
            (ctypes.c_int64 * count)(*(t.numel() for t, _, _ in triples)),
            *addresses,
            *([None] if others is None else []),
            ctypes.c_int(torch.get_num_threads()),
        )
        torch.autograd.graph.increment_version(list(columns[0]))


def _library(tensor: Tensor, mask: Tensor, other: Tensor | None) -> ctypes.CDLL | None:
    """The kernel, if it can take these: on the CPU, dense, entries in the same order."""
    word = _WORDS.get(tensor.element_size())
    alike = [mask] if other is None else [mask, other]
    dense = tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    plain = dense and all(t.stride() == tensor.stride() for t in alike)
    if not plain or tensor.device.type != "cpu" or word is None:
        return None
    return load("keep_where.c", Word=word)
