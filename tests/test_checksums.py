"""Checksums by which a mask notices weights that moved."""

import pytest
import torch

from gradmask.watch import checksum


def slow_checksum(values, mask=None, wide=False):
    """Integers of any size, one after the other; halves of wide ones are swapped."""
    golden, root = 0x9E3779B97F4A7C15, 0x6A09E667F3BCC909
    modulus, half = 1 << 64, 1 << 63
    signed = lambda v: (v + half) % modulus - half  # noqa: E731
    total = 0
    chunks = range(0, len(values), 1 << 18)
    for start in chunks:
        part = 0
        for i, value in enumerate(values[start : start + (1 << 18)]):
            if mask is None or not mask[start + i]:
                place = signed((i + 1) * golden)
                swapped = (value << 32) | (value >> 32 & 0xFFFFFFFF)
                part += (swapped if wide else value) * (signed((place ^ (place >> 29)) * root) | 1)
        total = total * golden + part
    return signed(total)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 5, (1 << 18) + 3])
def test_checksum_against_one_written_out(dtype, count):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(count, generator=generator) < 0.5
    before = values.clone()
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    bits, wide = values.view(words[values.element_size()]).tolist(), dtype == torch.float64
    assert checksum(values) == slow_checksum(bits, wide=wide)
    assert checksum(values, mask) == slow_checksum(bits, mask.tolist(), wide)
    assert torch.equal(values, before)


def test_checksum_is_of_values_and_places():
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    mask = x > 0
    for sum_of in (checksum, lambda t: checksum(t, mask)):
        assert sum_of(x) == sum_of(x.to(memory_format=torch.channels_last))
        assert sum_of(x) == sum_of(x.transpose(0, 3).contiguous().transpose(0, 3))
    assert checksum(x, mask) == checksum(torch.where(mask, 9.0, x), mask)
    assert checksum(x, mask) != checksum(torch.where(mask, x, x + 1), mask)
    pairs = [([1.0, -1.0], [-1.0, 1.0]), ([1.0, 2.0], [2.0, 1.0]), ([0.0, 1.0], [1.0, 0.0])]
    for a, b in [*pairs, ([1.0, 3.0], [-1.0, -3.0]), ([1.0] * 4, [-1.0] * 4)]:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            ours, theirs = (torch.tensor(values, dtype=dtype) for values in (a, b))
            assert checksum(ours) != checksum(theirs)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_checksum_of_complex_numbers(dtype):
    z, mask = torch.tensor([1 + 2j, 3 - 1j], dtype=dtype), torch.tensor([True, False])
    assert checksum(z) not in (
        checksum(z.conj().resolve_conj()),
        checksum(torch.view_as_real(z).flip(1)),
    )
    other = torch.tensor([5 + 5j, 3 - 1j], dtype=dtype)
    assert checksum(z, mask) == checksum(other, mask)
    assert checksum(z, ~mask) != checksum(other, ~mask)


def test_checksums_copy_no_whole_tensor():
    x = torch.zeros(1 << 22)
    checksum(x)
    with torch.profiler.profile(profile_memory=True) as profile:
        checksum(x, torch.zeros(1 << 22, dtype=torch.bool))
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < x.nbytes / 2
