"""What the gate before the kernels refuses, and what it leaves to PyTorch."""

import re
from pathlib import Path

import pytest
import torch

from gradmask import kernels
from gradmask.kernels import (
    Places,
    add_squared_products,
    can_add_squared_products,
    count_digits,
    gate,
    keep_where,
    select,
    weigh_squared_products,
)

needs_compiler = pytest.mark.skipif(
    not can_add_squared_products(torch.zeros(1)), reason="no C compiler"
)


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


def products(**changes):
    arguments = {
        "matrix": torch.zeros(4, 5),
        "g": torch.ones(2, 4, 3),
        "x": torch.ones(2, 10),
        "positions": torch.arange(3),
        "offsets": torch.arange(5),
    }
    matrix, g, x, positions, offsets = (arguments | changes).values()
    return matrix, g, x, Places(positions, offsets)


@needs_compiler
@pytest.mark.parametrize("kernel", [add_squared_products, weigh_squared_products])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"matrix": torch.zeros(4, 5).double()}, TypeError, "must be a tensor of torch.float32"),
        ({"x": torch.ones(2, 10).half()}, TypeError, "must be a tensor of torch.float32"),
        ({"g": torch.ones(2, 4, 3, dtype=torch.complex64)}, TypeError, "float32 or torch.float64"),
        ({"positions": torch.arange(3, dtype=torch.int32)}, TypeError, "torch.int64"),
        ({"offsets": None}, TypeError, "NoneType"),
        ({"x": torch.ones(2, 10, device="meta")}, ValueError, "on cpu, not on meta"),
        ({"offsets": torch.arange(5, device="meta")}, ValueError, "dense tensor"),
        ({"x": freed(torch.ones(2, 10))}, ValueError, "in memory"),
        ({"x": torch._neg_view(torch.ones(2, 10))}, ValueError, "dense tensor"),
        ({"positions": torch.arange(3)[None]}, ValueError, "one dimension"),
        ({"positions": torch.tensor([0, 1, 1 << 62])}, ValueError, "beyond a sample"),
        ({"positions": torch.arange(3) - 1, "offsets": torch.arange(5) + 1}, ValueError, "beyond"),
        ({"matrix": torch.zeros(1, 5).expand(4, 5)}, ValueError, "contiguous"),
        (
            {"g": torch.ones(1, 1, 1).expand(2, 1 << 54, 3), "matrix": torch.ones(1 << 54, 0)},
            ValueError,
            "must be of shape",
        ),
        (
            {
                "g": torch.ones(1, 1, 1).expand(1 << 52, 4, 3),
                "x": torch.ones(10).expand(1 << 52, 10),
            },
            ValueError,
            "too large",
        ),
    ],
)
def test_products_refused(kernel, changes, error, message):
    kernel(*products())
    with pytest.raises(error, match=message):
        kernel(*products(**changes))


@needs_compiler
def test_a_total_in_the_memory_of_what_is_read():
    memory = torch.ones(100)
    total, g = memory[:20].view(4, 5), memory[19:43].view(2, 4, 3)
    with pytest.raises(ValueError, match="lies in the memory"):
        add_squared_products(*products(matrix=total, g=g))
    weigh_squared_products(*products(matrix=total, g=g))  # written to neither
    add_squared_products(*products(matrix=total, g=memory[20:44].view(2, 4, 3)))
    assert total[0, 0] == 1 + 2 * 9


@needs_compiler
@pytest.mark.parametrize(
    ("sums", "error", "message"),
    [
        (lambda m: m[:20].view(4, 5), ValueError, "memory of the total"),
        (lambda m: m[19:39].view(4, 5), ValueError, "memory of the total"),
        (lambda m: m[40:60].view(4, 5), ValueError, "lies in the memory"),
        (lambda m: torch.zeros(5, 4), ValueError, "must be of shape"),
        (lambda m: torch.zeros(5, 4).t(), ValueError, "contiguous"),
        (lambda m: torch.zeros(4, 5).double(), TypeError, "must be a tensor of torch.float32"),
        (lambda m: freed(torch.zeros(4, 5)), ValueError, "in memory"),
    ],
)
def test_sums_refused(sums, error, message):
    memory = torch.ones(100)
    arguments = products(matrix=memory[:20].view(4, 5), g=memory[40:64].view(2, 4, 3))
    with pytest.raises(error, match=message):
        add_squared_products(*arguments, sums(memory))
    assert (memory == 1).all()
    add_squared_products(*arguments, memory[20:40].view(4, 5))
    assert memory[20] == 1 + 2 * 3


@needs_compiler
def test_a_default_device_changes_nothing():
    arguments = products()
    expected = weigh_squared_products(*arguments)
    with torch.device("meta"):
        assert torch.equal(weigh_squared_products(*arguments), expected)


@pytest.mark.parametrize(
    ("values", "shift", "prefix", "counts", "error"),
    [
        (torch.ones(3).half(), 0, None, torch.zeros(1 << 16).long(), TypeError),
        (torch.ones(3, dtype=torch.complex64), 0, None, torch.zeros(1 << 16).long(), TypeError),
        (torch.ones(3), 0, None, torch.zeros(1 << 16).int(), TypeError),
        (torch.ones(3), 0, None, torch.zeros((1 << 16) - 1).long(), ValueError),
        (torch.ones(3), 0, None, torch.zeros(1 << 16, 2).long()[:, 0], ValueError),
        (torch.ones(3), 0, None, torch.zeros(1, dtype=torch.long).expand(1 << 16), ValueError),
        (torch.ones(3, 2)[:, 0], 0, None, torch.zeros(1 << 16).long(), ValueError),
        (torch.ones(1).expand(1 << 60), 0, None, torch.zeros(1 << 16).long(), ValueError),
        (torch.ones(3, device="meta"), 0, None, torch.zeros(1 << 16).long(), ValueError),
        (freed(torch.ones(3)), 0, None, torch.zeros(1 << 16).long(), ValueError),
        (torch.ones(3), 17, None, torch.zeros(1 << 16).long(), ValueError),
        (torch.ones(3), -1, None, torch.zeros(1 << 16).long(), ValueError),
        (torch.ones(3), 0, 1 << 16, torch.zeros(1 << 16).long(), ValueError),
        (torch.ones(3), 0, -1, torch.zeros(1 << 16).long(), ValueError),
    ],
)
def test_digits_refused(values, shift, prefix, counts, error):
    with pytest.raises(error):
        count_digits(values, shift, prefix, counts)


TENSOR, MASK = torch.ones(4, 3), torch.zeros(4, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("tensor", "mask", "other", "error", "message"),
    [
        (TENSOR, MASK[:2], None, ValueError, "has shape (2, 3)"),  # a layer was replaced
        (TENSOR[:, :1], MASK[:, :1].clone(), TENSOR[:2, :1], ValueError, "has shape (2, 1)"),
        (TENSOR, MASK[:1], None, ValueError, "has shape (1, 3)"),  # not spread either
        (TENSOR, MASK.float(), None, TypeError, "torch.bool"),
        (TENSOR, MASK, TENSOR.double(), TypeError, "torch.float32"),
        (TENSOR, MASK, None, TypeError, "NoneType"),
        (TENSOR, MASK.to("meta"), None, ValueError, "on meta"),
        (torch.ones(1).expand(4, 3), MASK, None, ValueError, "overlaps itself"),
        (TENSOR, freed(MASK.clone()), None, ValueError, "lost its memory"),
        (freed(TENSOR.clone()), MASK, None, ValueError, "lost its memory"),
    ],
)
def test_masks_refused_before_anything_changes(tensor, mask, other, error, message):
    first = torch.ones(5)
    columns = [[first, tensor], [torch.zeros(5, dtype=torch.bool), mask]]
    if other is not None or "None" in message:
        columns.append([torch.zeros(5), other])
    with pytest.raises(error, match=re.escape(message)):
        keep_where(*columns)
    assert torch.equal(first, torch.ones(5))


def test_numbers_of_tensors_and_masks():
    with pytest.raises(ValueError, match="as many masks"):
        keep_where([TENSOR, TENSOR], [MASK])
    with pytest.raises(TypeError, match="only tensors"):
        keep_where([None], [MASK])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_conjugates_and_negatives(dtype):
    """Their bits are not their values."""
    mask = torch.tensor([True, False])
    tensor, other = torch.zeros(2, dtype=dtype), torch.tensor([1 + 2j, 3 + 4j], dtype=dtype)
    keep_where([tensor], [mask], [other.conj()])
    assert tensor.tolist() == [0, 3 - 4j]
    negative = torch._neg_view(torch.ones(2))
    real = torch.zeros(2)
    keep_where([real], [mask], [negative])
    assert real.tolist() == [0, -1]
    keep_where([negative], [mask], [torch.ones(2)])
    assert negative.tolist() == [-1, 1]


def test_tensors_in_the_same_memory_are_done_in_turn():
    memory = torch.arange(6.0)
    masks = [torch.tensor([True, False, True, True]), torch.tensor([True, True, True, False])]
    keep_where([memory[:4], memory[2:]], masks, [memory[1:5], memory[2:]])
    assert memory.tolist() == [0, 2, 2, 3, 4, 5]
    keep_where([memory[:4], memory[2:]], masks)
    assert memory.tolist() == [0, 0, 2, 3, 4, 0]


@needs_compiler
def test_what_the_kernel_takes(monkeypatch):
    """All that is usual: nothing may fall back to PyTorch unseen."""

    def refuse(*row):
        raise AssertionError("left to PyTorch")

    monkeypatch.setattr(select, "_keep_where", refuse)
    image = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tensors = [
        *(torch.nn.Parameter(torch.ones(3)), torch.ones(()), torch.ones(0, 4), image),
        *(torch.ones(9)[3:6], torch.ones(6, dtype=torch.bfloat16), torch.ones(2, 2).double()),
    ]
    masks = [torch.zeros_like(t, dtype=torch.bool, requires_grad=False) for t in tensors]
    with torch.no_grad():
        keep_where(tensors, masks)
    assert all(not t.any() for t in tensors)


def test_only_the_gate_knows_addresses():
    folder = Path(kernels.__file__).parent
    using = {path.name for path in folder.rglob("*.py") if "data_ptr" in path.read_text()}
    assert using == {Path(gate.__file__).name}
    for path in folder.parent.rglob("*.py"):
        assert path.parent == folder or "ctypes" not in path.read_text(), path
