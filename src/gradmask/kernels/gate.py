"""The one way into the kernels: what C and Triton are given is checked here, and nowhere else.

A kernel believes what it is told. So shapes, dtypes, devices and strides must agree, every entry
must lie in memory that its tensor has, and what is written must not overlap anything else.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Collection, Sequence
from math import prod
from operator import add, attrgetter, le
from typing import NamedTuple

import torch
from torch import Tensor, nn

DIGIT = 16  # bits of a digit
REALS = {torch.float32: "float", torch.float64: "double"}
# Complex numbers are not among them: they may be conjugated without a change of their bits.
WORDS = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.int16), "uint16_t"),
    **dict.fromkeys((torch.float32, torch.int32), "uint32_t"),
    **dict.fromkeys((torch.float64, torch.int64), "uint64_t"),
}
_PLAIN = {Tensor, nn.Parameter}  # other classes may have no memory of their own
_MOST = 1 << 53  # entries of g: only an expanded tensor has more, and C multiplies in 64 bits

Row = tuple[Tensor, ...]
_dtype, _shape, _nbytes, _is_cpu = map(attrgetter, ("dtype", "shape", "nbytes", "is_cpu"))
_Storage = torch.UntypedStorage


class Places:
    """Where in a sample's memory a contraction reads: at each position, plus each offset.

    Checked once, and copied: nobody else can change them.

    Args:
        positions: P integers (int64), in elements from a sample's first.
        offsets: D integers, likewise, from there.

    Raises:
        TypeError: If a dtype is another.
        ValueError: If a shape is, or a place lies before the sample.
    """

    def __init__(self, positions: Tensor, offsets: Tensor) -> None:
        for name, places in ("positions", positions), ("offsets", offsets):
            _check_memory(name, places, {torch.int64}, contiguous=True)
            if places.dim() != 1:
                raise ValueError(f"{name} must have one dimension, not shape {tuple(places.shape)}")
        self.shape = len(positions), len(offsets)
        own = [t.detach().to("cpu", copy=True) for t in (positions, offsets)]
        ends = [(int(t.min()), int(t.max())) if len(t) else (0, 0) for t in own]
        self.least, self.most = min(ends[0][0], ends[1][0]), ends[0][1] + ends[1][1]
        self._on = {torch.device("cpu"): own}

    def on(self, device: torch.device) -> list[Tensor]:
        """Positions and offsets there; copied once."""
        if device not in self._on:
            self._on[device] = [t.to(device) for t in self._on[torch.device("cpu")]]
        return self._on[device]


class Contraction(NamedTuple):
    """What the kernels for squared products work on; `check_products` makes it.

    Attributes:
        matrix: Shape (G, K, D).
        g: Shape (N, G, K, P).
        x: Shape (N, G, ...).
        positions: P places in a sample's group.
        offsets: D places from there.
    """

    matrix: Tensor
    g: Tensor
    x: Tensor
    positions: Tensor
    offsets: Tensor


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Where a tensor's first entry lies."""
    return ctypes.c_void_p(tensor.data_ptr())


def pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """Where the first entry of each tensor lies."""
    return (ctypes.c_void_p * len(tensors))(*map(Tensor.data_ptr, tensors))


def check_kept(*columns: Sequence[Tensor]) -> dict[str | None, list[Row]]:
    """Refuse what `keep_where` cannot work on, before anything is changed.

    Args:
        columns: Tensors, masks, and replacements if there are any.

    Returns:
        Rows of a tensor, its mask and replacement, by the C type that holds an entry; under None
        those that PyTorch must do: elsewhere, in other orders, of other dtypes, overlapping.

    Raises:
        TypeError: If something is no tensor, or of the wrong dtype.
        ValueError: If numbers of tensors, shapes or devices differ, or a tensor overlaps itself.
    """
    if len(set(map(len, columns))) > 1:
        raise ValueError("there must be as many masks, and replacements, as tensors")
    rows = list(zip(*columns, strict=True))
    if _all_fit(*columns):
        takes = [True] * len(rows)
    else:
        takes = [_fits(*row) for row in rows]
        if not _are_apart([t for row, fits in zip(rows, takes, strict=True) if fits for t in row]):
            return {None: rows}  # one after the other
    by_word: dict[str | None, list[Row]] = defaultdict(list)
    for row, fits in zip(rows, takes, strict=True):
        by_word[WORDS.get(row[0].dtype) if fits else None].append(row)
    return by_word


def _all_fit(tensors: Sequence[Tensor], *alike: Sequence[Tensor]) -> bool:
    """Whether the kernel can take all of them: a quick answer, a property at a time."""
    masks, *others = alike
    every = [tensor for column in (tensors, *alike) for tensor in column]
    if not (set(map(type, every)) <= _PLAIN and all(map(_is_cpu, every))):
        return False
    try:
        dtypes, shapes = list(map(_dtype, tensors)), list(map(_shape, tensors))
        return (
            set(map(_dtype, masks)) <= {torch.bool}
            and set(dtypes) <= WORDS.keys()
            and all(list(map(_dtype, column)) == dtypes for column in others)
            and all(list(map(_shape, column)) == shapes for column in alike)
            and (all(map(Tensor.is_contiguous, every)) or _all_dense(tensors, *alike))
            and not any(any(map(Tensor.is_neg, column)) for column in (tensors, *others))
            and _have_memory(every, list(map(_nbytes, every)))
        )
    except RuntimeError:  # sparse ones, for example, have no strides
        return False


def _all_dense(tensors: Sequence[Tensor], *alike: Sequence[Tensor]) -> bool:
    strides = list(map(Tensor.stride, tensors))
    same = all(list(map(Tensor.stride, column)) == strides for column in alike)
    return same and all(map(_is_dense, tensors))


def _have_memory(tensors: Sequence[Tensor], spans: Sequence[int]) -> bool:
    """Whether each lies within its storage, and no two in the same place."""
    starts = list(map(Tensor.data_ptr, tensors))
    ends = list(map(add, starts, spans))
    storages = list(map(Tensor.untyped_storage, tensors))
    limits = map(add, map(_Storage.data_ptr, storages), map(_Storage.nbytes, storages))
    return all(map(le, ends, limits)) and all(map(le, sorted(ends), sorted(starts)[1:]))


def _fits(tensor: Tensor, *alike: Tensor) -> bool:
    """Whether the kernel can take a row; an error if nothing can."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"only tensors are masked, not {type(tensor).__name__}")
    kinds = ("mask", torch.bool), ("replacement", tensor.dtype)
    for (name, dtype), one in zip(kinds, alike, strict=False):
        if not isinstance(one, Tensor) or one.dtype is not dtype:
            kind = getattr(one, "dtype", type(one).__name__)
            raise TypeError(f"the {name} must be a tensor of {dtype}, not of {kind}")
        if one.shape != tensor.shape:
            shapes = f"{tuple(one.shape)}, the tensor it is for {tuple(tensor.shape)}"
            raise ValueError(f"the {name} has shape {shapes}")
        if one.device != tensor.device:
            raise ValueError(f"the {name} is on {one.device}, its tensor on {tensor.device}")
    every = (tensor, *alike)
    if not all(map(_is_whole, filter(_is_strided, every))):
        raise ValueError("a tensor to be masked, or its mask, has lost its memory")
    if _is_strided(tensor) and _overlaps_itself(tensor):
        raise ValueError(f"a tensor of strides {tensor.stride()} overlaps itself: clone it first")
    return (
        all(map(is_plain, every))
        and tensor.is_cpu
        and tensor.dtype in WORDS
        and _is_dense(tensor)
        and all(one.stride() == tensor.stride() for one in every)
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's entries are numbers that lie in its memory, all of them.

    Not so if it is sparse, nested, fake or negated lazily, or if its storage was freed or cut.
    """
    if type(tensor) not in _PLAIN or not _is_strided(tensor):
        return False
    return not (tensor.is_meta or tensor.is_neg() or tensor.is_conj()) and _is_whole(tensor)


def _is_strided(tensor: Tensor) -> bool:
    own = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__  # not a wrapper of others
    return own and tensor.layout is torch.strided and not tensor.is_nested


def _is_whole(tensor: Tensor) -> bool:
    end = tensor.storage_offset() * tensor.itemsize + _span(tensor)
    return bool(end <= tensor.untyped_storage().nbytes())


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _span(tensor: Tensor) -> int:
    """Bytes from a tensor's first entry to the end of its last one."""
    if tensor.is_contiguous():
        return tensor.nbytes
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * step for size, step in steps)) * tensor.itemsize


def _are_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether no two of them lie in the same memory."""
    starts = list(map(Tensor.data_ptr, tensors))
    ends = map(add, starts, map(_span, tensors))
    return all(map(le, sorted(ends), sorted(starts)[1:]))


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two entries may lie in one place, as those of an expanded tensor do."""
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    reach = 0
    for step, size in sorted((step, size) for step, size in steps if size > 1):
        if step <= reach:
            return bool(tensor.numel())
        reach += (size - 1) * step
    return False


def check_digits(values: Tensor, shift: int, prefix: int | None, counts: Tensor) -> None:
    """Refuse what `count_digits` cannot count, with its arguments.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If a shape, stride, device or number is.
    """
    _check_memory("values", values, REALS, contiguous=True)
    _check_memory("counts", counts, {torch.int64}, torch.device("cpu"), contiguous=True)
    if counts.shape != (1 << DIGIT,):
        raise ValueError(f"counts has shape {tuple(counts.shape)}, not {(1 << DIGIT,)}")
    if values.is_cpu and not _are_apart([values, counts]):
        raise ValueError("counts lies in the memory of the values")
    above = 8 * values.itemsize - DIGIT - shift  # bits
    if shift < 0 or above < 0 or not 0 <= (prefix or 0) < 1 << above:
        raise ValueError(f"{values.dtype} has no digit at bit {shift} below {prefix}")


def check_products(
    matrix: Tensor, g: Tensor, x: Tensor, places: Places, *, written: bool
) -> Contraction | None:
    """Refuse what does not fit, and places outside of a sample.

    Args:
        matrix: The total, or weights.
        g: As in `add_squared_products`, like the others.
        x: Samples.
        places: Where in a sample.
        written: Whether the matrix is changed.

    Returns:
        All of it, with the places on the device of `g`; None if there is nothing to do.

    Raises:
        TypeError: If a dtype is not one that the kernels have.
        ValueError: If shapes, strides or devices do not fit, or places lie outside of a sample.
    """
    if not isinstance(places, Places):
        raise TypeError(f"places must be Places, not {type(places).__name__}")
    _check_memory("g", g, REALS)
    _check_memory("x", x, {g.dtype}, g.device)
    _check_memory("the total, or weights,", matrix, {g.dtype}, g.device, contiguous=True)
    positions, offsets = places.shape
    before = g.shape[: g.dim() - 2]  # samples, and groups
    if g.dim() not in (3, 4) or x.shape[: len(before)] != before or g.shape[-1] != positions:
        shapes = f"{tuple(g.shape)}, {tuple(x.shape)}, {(positions,)}"
        raise ValueError(f"g, x and positions do not fit each other: {shapes}")
    if matrix.shape != (*g.shape[1:-1], offsets):
        shape = *g.shape[1:-1], offsets
        raise ValueError(f"the total, or weights, must be of shape {shape}")
    if not (matrix.numel() and g.numel()):
        return None
    if prod(g.shape) > _MOST:
        raise ValueError(f"g has shape {tuple(g.shape)}: that is too large")
    inner = len(before)
    steps = zip(x.shape[inner:], x.stride()[inner:], strict=True)
    extent = sum((size - 1) * step for size, step in steps)
    if places.least < 0 or places.most > extent:
        raise ValueError("positions and offsets reach beyond a sample")
    start, end = matrix.data_ptr(), matrix.data_ptr() + matrix.nbytes
    if written and any(t.data_ptr() < end and start < t.data_ptr() + _span(t) for t in (g, x)):
        raise ValueError("the total lies in the memory of what it is made from")
    if inner == 1:
        matrix, g, x = matrix.unsqueeze(0), g.unsqueeze(1), x.unsqueeze(1)
    return Contraction(matrix, g, x, *places.on(g.device))


def check_apart(total: Tensor, sums: Tensor) -> None:
    """Refuse two results that lie in the same memory."""
    if all(map(is_plain, (total, sums))) and not _are_apart([total, sums]):
        raise ValueError("the sums lie in the memory of the total")


def _check_memory(
    name: str,
    tensor: Tensor,
    dtypes: Collection[torch.dtype],
    device: torch.device | None = None,
    *,
    contiguous: bool = False,
) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
        kind = getattr(tensor, "dtype", type(tensor).__name__)
        raise TypeError(f"{name} must be a tensor of {' or '.join(map(str, dtypes))}, not {kind}")
    if tensor.device != (device or tensor.device):
        raise ValueError(f"{name} must be on {device}, not on {tensor.device}")
    if not is_plain(tensor):
        raise ValueError(f"{name} must be a dense tensor with all of its entries in memory")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
