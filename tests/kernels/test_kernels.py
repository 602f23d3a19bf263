"""The compiled kernels against PyTorch."""

import os
import subprocess
import sys
from statistics import mode

import pytest
import torch

from gradmask.kernels import (
    Places,
    add_squared_products,
    can_add_squared_products,
    count_digits,
    digits,
    keep_where,
    select,
    weigh_squared_products,
)

needs_compiler = pytest.mark.skipif(
    not can_add_squared_products(torch.zeros(1)), reason="no C compiler"
)


def gradients(g, x, positions, offsets):
    x = x.as_strided((len(x), x[0].numel()), (x.stride(0), 1)) if x[0].is_contiguous() else x
    patches = x[:, positions[:, None] + offsets]  # (n, positions, inputs)
    return torch.einsum("nkp,npd->nkd", g, patches)


def expected(total, g, x, positions, offsets):
    return total + gradients(g, x, positions, offsets).square().sum(0)


def check(arguments, exact, threads):
    """Both kernels, of a total and of weights, against what is exact."""
    total, weights, *read = arguments
    before, alone = torch.get_num_threads(), total.clone()
    sums = torch.ones_like(total)
    try:
        torch.set_num_threads(threads)
        add_squared_products(total, *read, sums)
        add_squared_products(alone, *read)
        values = weigh_squared_products(weights, *read)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, total)
    tolerance = 1e-13 if total.dtype == torch.float64 else 1e-5
    *exact, plain = exact
    torch.testing.assert_close(sums.double(), 1 + plain, rtol=10 * tolerance, atol=20 * tolerance)
    for found, truth in zip((total, values), exact, strict=True):
        assert ((found.double() - truth).abs() / truth).max() < tolerance


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("samples", "outputs", "inputs", "places"),
    [
        (1, 1, 1, 1),
        (3, 16, 12, 5),
        (2, 33, 25, 17),
        (5, 70, 7, 64),
        (4, 31, 13, 1),
        (300, 9, 30, 40),
    ],
)
def test_squared_products(samples, outputs, inputs, places, dtype, threads):
    g = torch.randn(samples, outputs, places, dtype=dtype)
    x = torch.randn(samples, 200, dtype=dtype)
    positions = torch.randint(100, (places,))
    offsets = torch.randint(100, (inputs,))
    total, weights = torch.rand(2, outputs, inputs, dtype=dtype)
    plain = gradients(g.double(), x.double(), positions, offsets)
    squares = plain.square()
    exact = total.double() + squares.sum(0), (squares * weights).sum((1, 2)), plain.sum(0)
    check((total, weights, g, x, Places(positions, offsets)), exact, threads)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("samples", "groups", "outputs", "kernel", "size"),
    [
        (3, 5, 1, (3, 3), (7, 6)),
        (2, 1, 6, (5, 5), (9, 9)),
        (1, 2, 2, (1, 11), (3, 13)),
        (4, 3, 7, (7, 7), (7, 7)),
        (2, 2, 20, (2, 3), (5, 4)),
        (1, 1, 1, (1, 1), (1, 1)),
    ],
)
def test_groups(samples, groups, outputs, kernel, size, dtype, threads):
    """Few outputs in a group have a kernel of their own, with vectors along the offsets."""
    x = torch.randn(samples, groups, *size, dtype=dtype)
    rows, columns = (torch.arange(n) for n in kernel)
    offsets = (rows[:, None] * size[1] + columns).flatten()
    ends = [s - k + 1 for s, k in zip(size, kernel, strict=True)]
    positions = (torch.arange(ends[0])[:, None] * size[1] + torch.arange(ends[1])).flatten()
    g = torch.randn(samples, groups, len(positions), outputs, dtype=dtype).transpose(2, 3)
    total, weights = torch.rand(2, groups, outputs, len(offsets), dtype=dtype)
    patches = x.double().flatten(2)[:, :, positions[:, None] + offsets]
    plain = torch.einsum("ngkp,ngpd->ngkd", g.double(), patches)
    squares = plain.square()
    exact = total.double() + squares.sum(0), (squares * weights).sum((1, 2, 3)), plain.sum(0)
    check((total, weights, g, x, Places(positions, offsets)), exact, threads)


@needs_compiler
def test_no_lane_beyond_the_inputs_is_counted():
    x = torch.ones(2, 1, 16)
    x[:, :, 3:] = torch.inf  # read with the rest, and left out
    places = Places(torch.zeros(1, dtype=torch.int64), torch.arange(3))
    values = weigh_squared_products(torch.ones(1, 1, 3), torch.ones(2, 1, 1, 1), x, places)
    assert values.tolist() == [3.0, 3.0]


@needs_compiler
def test_any_strides():
    g = torch.randn(7, 4, 5, dtype=torch.float64).permute(1, 2, 0)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64).permute(2, 0, 1, 3)  # samples third
    positions = torch.arange(7) % 2 * x.stride(1)
    offsets = torch.arange(6)
    total = torch.zeros(5, 6, dtype=torch.float64)
    add_squared_products(total, g, x, Places(positions, offsets))
    patches = torch.stack([x[:, p % 2, 0] for p in range(7)], 1)
    truth = torch.einsum("nkp,npd->nkd", g, patches).square().sum(0)
    torch.testing.assert_close(total, truth, rtol=1e-12, atol=0)


@needs_compiler
def test_number_of_threads_changes_no_bit():
    g, x = torch.randn(9, 40, 30), torch.randn(9, 100)
    positions, offsets = torch.arange(30), torch.arange(50)
    found = []
    for threads in (1, 2, 5):
        total = torch.zeros(40, 50)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        add_squared_products(total, g, x, Places(positions, offsets))
        found.append(
            (total, weigh_squared_products(torch.ones(40, 50), g, x, Places(positions, offsets)))
        )
        torch.set_num_threads(before)
    assert all(map(torch.equal, found[0], found[1]))
    assert all(map(torch.equal, found[0], found[2]))


@needs_compiler
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total": torch.zeros(3, 5)}, "must be of shape"),
        ({"total": torch.zeros(5, 4).t()}, "must be contiguous"),
        ({"positions": torch.arange(2)}, "do not fit"),
        ({"x": torch.zeros(1, 9)}, "do not fit"),
        ({"positions": torch.tensor([0, 1, 6])}, "beyond a sample"),
        ({"offsets": torch.tensor([0, -1, 1, 2, 2])}, "beyond a sample"),
    ],
)
def test_reading_outside_is_refused(change, message):
    def add(total, g, x, positions, offsets):
        add_squared_products(total, g, x, Places(positions, offsets))

    arguments = {
        "total": torch.zeros(4, 5),
        "g": torch.zeros(2, 4, 3),
        "x": torch.zeros(2, 10),
        "positions": torch.arange(3),
        "offsets": torch.arange(5),
    }
    add(**arguments)
    with pytest.raises(ValueError, match=message):
        add(**(arguments | change))


@needs_compiler
def test_nothing_to_add():
    total = torch.ones(4, 5)
    for n, places in ((0, 3), (2, 0)):
        g, x = torch.zeros(n, 4, places), torch.zeros(n, 10)
        grid = Places(torch.arange(places), torch.arange(5))
        add_squared_products(total, g, x, grid)
        values = weigh_squared_products(total, g, x, grid)
        assert torch.equal(values, torch.zeros(n, dtype=torch.float64))
    assert torch.equal(total, torch.ones(4, 5))


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex128]


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("replaced", [True, False])
def test_keep_where(replaced, dtype, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(select, "load", lambda *_, **__: None)
    shapes = [(3, 5, 7, 9), (1000,), (), (0,), (4, 6), (8, 3, 5, 5)]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    tensors[0] = tensors[0].to(memory_format=torch.channels_last)
    tensors[4] = tensors[4].t()
    tensors[1][::3] = torch.inf
    tensors[1][1::3] = torch.nan
    masks = [
        torch.empty_like(t, dtype=torch.bool).copy_(torch.rand(t.shape) < 0.4) for t in tensors
    ]
    masks[5] = masks[5].contiguous(memory_format=torch.channels_last)  # in another order
    others = [torch.randn(t.shape).to(dtype) for t in tensors] if replaced else None
    zeros = [torch.zeros_like(t) for t in tensors]
    expected = [
        torch.where(m, t, o) for m, t, o in zip(masks, tensors, others or zeros, strict=True)
    ]
    versions = [t._version for t in tensors]
    keep_where(tensors, masks, others)
    for tensor, truth in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor, truth, rtol=0, atol=0, equal_nan=True)
    assert all(t._version > v for t, v in zip(tensors, versions, strict=True))


def test_keep_where_of_nothing():
    keep_where([], [])
    keep_where([], [], [])


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("size", [1, 33, 70_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_count_digits(dtype, size, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(digits, "load", lambda *_, **__: None)
    values = torch.randn(size, dtype=dtype)
    values[::5] = -0.0
    integer, width = (torch.int32, 32) if dtype == torch.float32 else (torch.int64, 64)
    bits = [int(b) % 2**width for b in values.add(0.0).view(integer)]
    most = mode(b >> 16 for b in bits)
    for shift, prefix in ((width - 16, None), (0, None), (0, most), (0, 12345)):
        counts = torch.arange(1 << 16, device="cpu")
        count_digits(values, shift, prefix, counts)
        truth = torch.arange(1 << 16, device="cpu")
        for b in bits:
            if prefix is None or b >> shift >> 16 == prefix:
                truth[(b >> shift) % 2**16] += 1
        assert torch.equal(counts, truth)


def test_other_types_are_left_to_pytorch():
    assert not can_add_squared_products(torch.zeros(1, dtype=torch.bfloat16))
    assert not can_add_squared_products(torch.zeros(1), torch.zeros(1, dtype=torch.float64))
    assert not can_add_squared_products(torch.zeros(1, device="meta"))


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_pool_of_threads():
    """Two OpenMP libraries in one process would compete for the cores."""
    code = (
        "import torch\n"
        "from gradmask.kernels.library import load\n"
        "assert load('squared_products.c', Real='float')\n"
        "maps = open('/proc/self/maps').read().splitlines()\n"
        "print(len({line.split()[-1] for line in maps if 'gomp' in line}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "1"


INTERPRETED = """
import torch
from gradmask.kernels import gate, triton_products

torch.manual_seed(0)
for samples, outputs, inputs, places, splits in {cases}:
    triton_products._multiprocessors = lambda _: splits
    g = torch.randn(outputs, samples, places).transpose(0, 1)
    x = torch.randn(samples, 2, 200)[:, 1]
    positions, offsets = torch.randint(100, (places,)), torch.randint(100, (inputs,))
    total = torch.rand(outputs, inputs)
    patches = x[:, positions[:, None] + offsets].double()
    truth = total.double() + torch.einsum("nkp,npd->nkd", g.double(), patches).square().sum(0)
    work = gate.check_products(total, g, x, gate.Places(positions, offsets), written=True)
    one = work._replace(matrix=work.matrix[0], g=work.g[:, 0], x=work.x[:, 0])
    triton_products.add_squared_products(one)
    assert ((total - truth) / truth).abs().max() < 1e-5, (samples, outputs, inputs, places)
"""


def test_triton_kernel_in_the_interpreter():
    pytest.importorskip("triton", minversion="3.7", reason="older ones lack NumPy 2.4 or names")
    cases = [(3, 70, 130, 45, 1), (5, 64, 64, 32, 3), (1, 1, 1, 1, 1), (7, 5, 3, 33, 9)]
    code = INTERPRETED.format(cases=cases)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_triton_kernel_compiles_for_a_gpu():
    pytest.importorskip("triton", minversion="3.2.1")
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gradmask.kernels.triton_products import squares

types = ["*fp32"] * 2 + ["*i64"] * 2 + ["*fp32"] + ["i32"] * 9
for precision in ("ieee", "tf32"):
    blocks = {"block_k": 64, "block_d": 64, "block_p": 32, "precision": precision}
    signature = dict(zip(squares.arg_names, types)) | dict.fromkeys(blocks, "constexpr")
    source = ASTSource(squares, signature, constexprs=blocks)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    print(made.metadata.shared, len(made.asm["cubin"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shared = [int(line.split()[0]) for line in done.stdout.splitlines()]
    assert len(shared) == 2
    assert max(shared) <= 48 * 1024  # what every GPU gives without asking


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_triton_kernel_on_a_gpu(monkeypatch):
    monkeypatch.setenv("GRADMASK_TRITON", "1")
    g, x = torch.randn(8, 130, 70, device="cuda"), torch.randn(8, 300, device="cuda")
    positions, offsets = torch.arange(70), torch.arange(150)
    total = torch.zeros(130, 150, device="cuda")
    assert can_add_squared_products(total, g, x)
    add_squared_products(total, g, x, Places(positions, offsets))
    truth = expected(torch.zeros(130, 150), g.cpu(), x.cpu(), positions, offsets)
    torch.testing.assert_close(total.cpu(), truth, rtol=1e-4, atol=1e-4)
