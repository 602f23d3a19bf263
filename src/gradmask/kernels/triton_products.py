"""The squared products of `products` on a GPU: tiles are squared in registers, never written.

Off unless the environment variable `GRADMASK_TRITON=1` is set: the results are tested in Triton's
interpreter, the speed has not been measured on a GPU yet. Imported only where it is used, so that
the package works without Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradmask.kernels.gate import Contraction

BLOCK_OUTPUTS, BLOCK_INPUTS, BLOCK_POSITIONS = 64, 64, 32
_WAVES = 4  # programs for each multiprocessor: the samples are split until there are that many


@triton.jit
def squares(
    g, x, positions, offsets, out,
    samples, outputs, inputs, places, g_sample, g_output, g_place, x_sample, out_split,
    block_k: tl.constexpr, block_d: tl.constexpr, block_p: tl.constexpr,
    precision: tl.constexpr,
) -> None:  # fmt: skip
    """A tile of outputs by inputs, over one of the splits of the samples."""
    # In 64 bits: a place in a tensor of 8 GiB does not fit into 32.
    k = tl.program_id(0).to(tl.int64) * block_k + tl.arange(0, block_k)
    d = tl.program_id(1).to(tl.int64) * block_d + tl.arange(0, block_d)
    split, splits = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    in_k, in_d = k < outputs, d < inputs
    offset = tl.load(offsets + d, mask=in_d, other=0)
    total = tl.zeros((block_k, block_d), tl.float32)
    for n in range(split, samples, splits):
        product = tl.zeros((block_k, block_d), tl.float32)
        rows, patches = g + n * g_sample, x + n * x_sample
        for start in range(0, places, block_p):
            p = start + tl.arange(0, block_p).to(tl.int64)
            in_p = p < places
            place = tl.load(positions + p, mask=in_p, other=0)
            a = tl.load(
                rows + k[:, None] * g_output + p[None, :] * g_place,
                mask=in_k[:, None] & in_p[None, :],
                other=0.0,
            )
            b = tl.load(
                patches + place[:, None] + offset[None, :],
                mask=in_p[:, None] & in_d[None, :],
                other=0.0,
            )
            product = tl.dot(a, b, product, input_precision=precision)
        total += product * product
    tl.store(
        out + split * out_split + k[:, None] * inputs + d[None, :],
        total,
        mask=in_k[:, None] & in_d[None, :],
    )


def add_squared_products(work: Contraction) -> None:
    """As `products.add_squared_products`, for float32 tensors on one CUDA device.

    The samples are split over programs, whose parts are added up in a fixed order: the result is
    the same each time. TF32 is used where PyTorch's matrix products may use it.

    Args:
        work: The total and what is added to it, as `gate.check_products` found it right.
    """
    total, g, x, positions, offsets = work
    samples, outputs, places = g.shape
    inputs = len(offsets)
    tiles = -(-outputs // BLOCK_OUTPUTS), -(-inputs // BLOCK_INPUTS)
    splits = min(samples, max(1, _WAVES * _multiprocessors(g) // (tiles[0] * tiles[1])))
    parts = torch.empty(splits, outputs, inputs, device=total.device)
    exact = torch.get_float32_matmul_precision() == "highest"
    squares[*tiles, splits](
        g, x, positions, offsets, parts,
        samples, outputs, inputs, places, *g.stride(), x.stride(0), parts.stride(0),
        block_k=BLOCK_OUTPUTS, block_d=BLOCK_INPUTS, block_p=BLOCK_POSITIONS,
        precision="ieee" if exact else "tf32",
    )  # fmt: skip
    total += parts.sum(0)


def _multiprocessors(tensor: Tensor) -> int:
    if not tensor.is_cuda:  # Triton's interpreter
        return 1
    count: int = torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return count
