"""Histograms of the leading digits of floats, from which any order statistic follows exactly."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from gradmask.kernels.gate import DIGIT, check_digits, pointer
from gradmask.kernels.library import load

_WORDS = {
    torch.float32: ("uint32_t", ctypes.c_uint32),
    torch.float64: ("uint64_t", ctypes.c_uint64),
}
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
_CHUNK = 1 << 18  # values PyTorch works on at a time: few enough to stay in a cache


def count_digits(values: Tensor, shift: int, prefix: int | None, counts: Tensor) -> None:
    """Count non-negative floats by 16 of their bits, whose order is that of the values.

    Args:
        values: Contiguous float32 or float64 values; -0 counts as 0.
        shift: Lowest bit of the digit.
        prefix: Count only values with these bits above the digit (default: all values).
        counts: 65,536 integers on the CPU, changed in place. Negative values, infinities and NaN
            are found in the last of the bins when the digit is the highest.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape, stride, device or number is, or counts lies in the values' memory.
        MemoryError: If there is no memory for the counts of a thread.
    """
    check_digits(values, shift, prefix, counts)
    word, number = _WORDS[values.dtype]
    library = load("count_digits.c", Word=word) if values.device.type == "cpu" else None
    if library is None:
        for chunk in values.reshape(-1).split(_CHUNK):
            _count_chunk(chunk, shift, prefix, counts)
    elif library.count_digits(
        ctypes.c_int64(values.numel()),
        pointer(values),
        ctypes.c_int(shift),
        ctypes.c_int(prefix is None),
        number(prefix or 0),
        pointer(counts),
        ctypes.c_int(torch.get_num_threads()),
    ):
        raise MemoryError("no memory for the counts of the threshold")


def _count_chunk(values: Tensor, shift: int, prefix: int | None, counts: Tensor) -> None:
    # Adding 0 turns -0 into 0; the mask keeps the sign bit from filling the number.
    keys = values.add(0.0).view(_INTEGERS[values.dtype])
    if prefix is not None:
        keys = keys[keys >> (shift + DIGIT) == prefix]
    digits = (keys >> shift) & ((1 << DIGIT) - 1)
    counts += torch.bincount(digits, minlength=1 << DIGIT).cpu()
