"""Kernels with arguments that do not fit: `python kernel_fuzzing.py FIRST_SEED COUNT`."""

import json
import random
import sys
import warnings
from collections import Counter

import torch

from gradmask.kernels import (
    Places,
    add_squared_products,
    count_digits,
    keep_where,
    weigh_squared_products,
)

REALS = [torch.float32, torch.float64]

DTYPES = [
    *(*REALS, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
]

SMALL = 1 << 20


class Subclass(torch.Tensor):
    pass


def some(dice, shape, dtype):
    """Random entries, in memory of their own to the byte."""
    values = torch.randn(shape, dtype=torch.float64).mul(3)
    return values > 0 if dtype == torch.bool else values.to(dtype)


def another_shape(dice, tensor):
    shape = list(tensor.shape) or [1]
    place = dice.randrange(len(shape))
    shape[place] = max(0, shape[place] + dice.choice([-1, 1, -shape[place], 5]))
    return tensor.new_zeros(dice.choice([shape, shape[1:], [*shape, 1], [1, *shape], shape[::-1]]))


def strided(dice, tensor):
    wide = tensor.new_zeros([*tensor.shape, 2])[..., 0]
    turned = tensor.mT.contiguous().mT if tensor.dim() > 1 else wide
    return dice.choice([wide, turned]).copy_(tensor)


def expanded(dice, tensor):
    first = tensor.new_ones([1] * tensor.dim())
    return first.expand(tensor.shape)


def huge(dice, tensor):
    shape = [dice.choice([1 << 54, 1 << 60]), *[1] * (tensor.dim() - 1)]
    dice.shuffle(shape)
    return tensor.new_zeros([1] * max(1, tensor.dim())).expand(shape)


def without_memory(dice, tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(dice.choice([0, tensor.nbytes // 2]))
    return tensor


def elsewhere(dice, tensor):
    return tensor.to("meta")


def another_dtype(dice, tensor):
    return tensor.to(dice.choice(DTYPES))


def another_kind(dice, tensor):
    ways = [lambda t: t.as_subclass(Subclass), lambda t: t.to_sparse(), lambda t: None]
    return dice.choice(ways)(tensor)


def negated(dice, tensor):
    if tensor.is_complex():
        return tensor.conj()
    return torch._neg_view(tensor) if tensor.is_floating_point() else tensor


SPOILERS = [
    *(another_shape, strided, expanded, huge, without_memory, elsewhere, another_dtype),
    *(another_kind, negated),
]


def readable(tensor):
    """Whether it may be read at all, found in another way than the gate's."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
        return False
    if tensor.is_meta:
        return False
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + last + 1) * tensor.itemsize if tensor.numel() else 0
    return tensor.untyped_storage().nbytes() >= end


def products(dice):
    n, k, p, d = (dice.choice([0, 1, 2, 3, 9, 40]) for _ in range(4))
    dtype, length = dice.choice(REALS), dice.choice([1, 5, 60])
    places = [torch.tensor([dice.randrange(length) for _ in range(s)]).long() for s in (p, d)]
    groups = dice.choice([(), (), (1,), (3,)])
    g, x = some(dice, (n, *groups, k, p), dtype), some(dice, (n, *groups, 2 * length - 1), dtype)
    return {
        "matrix": some(dice, (*groups, k, d), dtype).abs(),
        "g": g,
        "x": x,
        "p": places[0],
        "d": places[1],
    }


def products_and_sums(dice):
    arguments = products(dice)
    matrix = arguments["matrix"]
    return arguments | {"s": some(dice, matrix.shape, matrix.dtype)}


def contractions(matrix, g, x, p, d):
    assert len({t.dtype for t in (matrix, g, x)}) == 1
    assert p.dtype == d.dtype == torch.int64
    assert g.dim() in (3, 4)
    assert p.shape + d.shape == (g.shape[-1], matrix.shape[-1])
    assert matrix.shape[:-1] == g.shape[1:-1]
    outer = g.shape[:-2]  # samples, and groups
    assert x.shape[: len(outer)] == outer
    patches = torch.zeros(*outer, len(p), len(d), dtype=torch.float64)
    if g.numel() and matrix.numel():  # or nothing is read
        inner = zip(x.shape[len(outer) :], x.stride()[len(outer) :], strict=True)
        last = sum((n - 1) * step for n, step in inner)
        memory = x.as_strided((*outer, last + 1), (*x.stride()[: len(outer)], 1)).double()
        patches = memory[..., p[:, None] + d]
    return torch.einsum("...kp,...pd->...kd", g.double(), patches)


def added(**given):
    return {"matrix": given["matrix"].double() + contractions(**given).square().sum(0)}


def added_both(s, **given):
    assert s.dtype == given["matrix"].dtype
    assert s.shape == given["matrix"].shape
    return added(**given) | {"s": s.double() + contractions(**given).sum(0)}


def weighed(**given):
    weighed = contractions(**given).square() * given["matrix"].double()
    return {"result": weighed.flatten(1).sum(1)}


def digits(dice):
    dtype = dice.choice(REALS)
    values = some(dice, dice.choice([0, 1, 33, 300, 70_000]), dtype).abs()
    values[::5] = -0.0
    bits = 8 * dtype.itemsize
    shift = dice.choice(range(0, bits, 16))
    key = values.add(0.0).view(torch.int32 if bits == 32 else torch.int64)[:1].sum().item()
    prefix = dice.choice([None, key >> shift >> 16])
    counts = torch.arange(1 << 16)
    return {"values": values, "shift": shift, "prefix": prefix, "counts": counts}


def counted(values, shift, prefix, counts):
    assert values.dtype in REALS
    assert counts.dtype == torch.int64
    assert counts.shape == (1 << 16,)
    bits = 8 * values.itemsize
    assert 0 <= shift <= bits - 16
    assert 0 <= (prefix or 0) < 1 << (bits - 16 - shift)
    keys = values.add(0.0).view(torch.int32 if bits == 32 else torch.int64).flatten().tolist()
    found = Counter(
        key >> shift & 65535 for key in keys if prefix is None or key >> shift >> 16 == prefix
    )
    counts = counts.clone()
    counts[list(found)] += torch.tensor(list(found.values()), dtype=torch.int64)
    return {"counts": counts}


def kept(dice, names="tm"):
    arguments = {}
    for row in range(dice.choice([1, 1, 2, 3])):
        shape = [dice.choice([0, 1, 2, 3, 3, 8, 8, 30]) for _ in range(dice.randrange(5))]
        dtype = dice.choice(DTYPES + 3 * REALS)
        for name in names:
            tensor = some(dice, shape, torch.bool if name == "m" else dtype)
            if len(shape) == 4 and row % 2:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            arguments[f"{name}{row}"] = tensor
    return arguments


def columns(arguments):
    by_kind = [[v for n, v in arguments.items() if n[0] == kind] for kind in "tmo"]
    return by_kind if by_kind[2] else by_kind[:2]


def selected(**given):
    truth = {}
    for row, (tensor, mask, *other) in enumerate(zip(*columns(given), strict=True)):
        other = other[0] if other else torch.zeros_like(tensor)
        assert mask.dtype == torch.bool
        assert other.dtype == tensor.dtype
        assert tensor.shape == mask.shape == other.shape
        truth[f"t{row}"] = torch.where(mask, tensor, other)
    return truth


def with_places(matrix, g, x, p, d, *sums):
    return matrix, g, x, Places(p, d), *sums


# For each kernel arguments that fit, and what it must find: computed slowly, in float64.
KERNELS = {
    "add": (products, added, lambda a: add_squared_products(*with_places(*a.values()))),
    "both": (
        products_and_sums,
        added_both,
        lambda a: add_squared_products(*with_places(*a.values())),
    ),
    "weigh": (products, weighed, lambda a: weigh_squared_products(*with_places(*a.values()))),
    "count": (digits, counted, lambda a: count_digits(*a.values())),
    "keep": (kept, selected, lambda a: keep_where(*columns(a))),
    "replace": (lambda d: kept(d, "tmo"), selected, lambda a: keep_where(*columns(a))),
}

WRITTEN = {"add": {"matrix"}, "both": {"matrix", "s"}, "count": {"counts"}}


def spoil(dice, arguments):
    name = dice.choice(list(arguments))
    value = arguments[name]
    if readable(value) and type(value) is torch.Tensor and value.numel() < SMALL:
        is_place = name in "pd" and value.dtype == torch.int64 and value.dim() and value.numel()
        if is_place and dice.random() < 0.5:
            value = arguments[name] = value.clone()
            wrong = [-1, 10**6, 1 << 62, -(1 << 62), (1 << 63) - 1, len(value)]
            value[dice.randrange(len(value))] = dice.choice(wrong)
        else:
            arguments[name] = dice.choice(SPOILERS)(dice, value)
    elif name in ("shift", "prefix"):
        arguments[name] = dice.choice([-1, 1, 7, 16, 48, 64, 1 << 40, 1 << 70])


def overlap(dice, arguments):
    """Put two of them into the same memory, and name them."""
    names = [n for n, v in arguments.items() if readable(v) and v.is_contiguous() and v.numel()]
    if len(names) < 2:
        return ()
    one, two = dice.sample(names, 2)
    a, b = arguments[one], arguments[two]
    memory = torch.zeros(max(a.nbytes, 16) + b.nbytes, dtype=torch.uint8)
    step = dice.choice([0, 16]) if a.nbytes > 16 else 0
    for name, value, start in ((one, a, 0), (two, b, step)):
        place = memory[start : start + value.nbytes].view(value.dtype).view(value.shape)
        arguments[name] = place.copy_(value)
    return one, two


def attack(kernel, dice):
    """Returns `refused` or `right`; raises AssertionError at anything else."""
    make, reference, call = KERNELS[kernel]
    arguments = make(dice)
    spoilt = dice.choice([0, 1, 1, 2])
    for _ in range(spoilt):
        spoil(dice, arguments)
    overlapping = overlap(dice, arguments) if dice.random() < 0.2 else ()
    tensors = {n: v for n, v in arguments.items() if isinstance(v, torch.Tensor)}
    known = all(map(readable, tensors.values()))
    small = all(v.numel() < SMALL for v in tensors.values())
    before = {n: v.clone() for n, v in tensors.items() if readable(v) and v.numel() < SMALL}
    exact = arguments | {n: v for n, v in before.items() if arguments[n].is_contiguous()}
    try:
        truth = {n: v.clone() for n, v in reference(**exact).items()} if known and small else None
    except (AssertionError, RuntimeError, IndexError, TypeError, AttributeError):
        truth = None
    keeps = kernel in ("keep", "replace")
    try:
        result = call(arguments)
    except (TypeError, ValueError):
        assert spoilt or overlapping, "arguments that fit were refused"
        for name, value in before.items():
            assert torch.equal(value.view_as(value), arguments[name]) or value.isnan().any()
        return "refused"
    except (RuntimeError, AttributeError):
        if keeps and spoilt:  # what is left to PyTorch
            return "refused"
        raise
    if overlapping and keeps:
        return "right"  # one after the other, or at once: nothing was lost
    nothing = kernel in ("add", "both") and not (
        arguments["matrix"].numel() and arguments["g"].numel()
    )
    read = set(overlapping) - {"p", "d"}  # of which there are copies
    assert nothing or len(read) < 2 or not WRITTEN.get(kernel, set()) & read, (
        "wrote into what it read"
    )
    unknown = not small if known else keeps
    assert truth is not None or unknown, "accepted what does not fit"
    for name, value in (truth or {}).items():
        found = result if name == "result" else arguments[name]
        if keeps or kernel == "count":
            assert torch.equal(found.resolve_neg(), value.resolve_neg()), name
        else:
            bound = 1e-11 if arguments["g"].dtype == torch.float64 else 1e-4
            finite = value.nan_to_num(0, 0, 0).abs()  # other bits, where memory overlaps
            options = {
                "rtol": bound,
                "atol": bound * (1 + max(finite.flatten().tolist(), default=0)),
            }
            assert torch.allclose(found.double(), value, **options, equal_nan=True), name
    return "right"


def main(first, count):
    warnings.simplefilter("ignore")
    found = Counter()
    for seed in range(first, first + count):
        kernel = list(KERNELS)[seed % len(KERNELS)]
        torch.manual_seed(seed)
        try:
            found[f"{kernel} {attack(kernel, random.Random(seed))}"] += 1
        except BaseException:
            print(f"seed {seed}, {kernel}", file=sys.stderr)
            raise
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
