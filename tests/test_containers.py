import dataclasses
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from gradmask.containers import check_cuttable, map_tensors, part, sample_count, tensors_in
from gradmask.errors import DataError

X = torch.arange(5)
Pair = namedtuple("Pair", "a b")


@dataclasses.dataclass(frozen=True)
class Frozen:
    a: Tensor
    kind: str = "kind"


@dataclasses.dataclass
class Slotted:
    __slots__ = ("a",)
    a: Tensor


class Own(dict):
    """Its constructor takes something else."""

    def __init__(self, size, **entries):
        super().__init__(**entries)
        self.size = size


class Rows(list):
    pass


class Plain:
    def __init__(self, value):
        self.value = value


class Hidden:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


CUT = {
    "tensor": X,
    "tuple": (X, 3),
    "list": [X, None],
    "dict": {"a": X, "b": "text"},
    "ordered": OrderedDict(a=X),
    "default": defaultdict(list, a=X),
    "own-dict": Own(3, a=X),
    "user-dict": UserDict(a=X),
    "named": Pair(X, X + 1),
    "frozen": Frozen(X),
    "slotted": Slotted(X),
    "list-subclass": Rows([X]),
    "nested": {"a": [Pair(X, (X,)), Frozen(X)]},
    "maximum": torch.stack([X, X], 1).max(1),
    "scalar": (X, torch.tensor(3)),
}


@pytest.mark.parametrize("case", CUT)
def test_what_can_be_cut(case):
    value = CUT[case]
    found = part(value, slice(1, 3))
    assert type(found) is type(value)
    for whole, cut in zip(tensors_in(value), tensors_in(found), strict=True):
        assert torch.equal(cut, whole[1:3] if whole.dim() else whole)
    assert all(len(t) == 5 for t in tensors_in(value) if t.dim()), "the original has changed"
    check_cuttable(value, "inputs")
    assert sample_count(value) == 5


NOT_CUT = {
    "plain": Plain(X),
    "slots": Hidden(X),
    "nested": Plain({"deep": [X]}),
    "namespace": SimpleNamespace(a=X),
    "packed": pack_sequence([X, X]),
    "array": np.arange(5),
    "set": {X},
    "read-only": MappingProxyType({"a": X}),
}


@pytest.mark.parametrize("case", NOT_CUT)
def test_what_cannot_be_cut_raises_when_it_is_used(case):
    value = NOT_CUT[case]
    with pytest.raises(DataError, match="cannot be cut"):
        check_cuttable((X, value), "inputs")
    _, guard = part((X, value), slice(1))
    for use in (
        lambda g: g.value,
        lambda g: g["a"],
        lambda g: list(g),
        len,
        bool,
        lambda g: g(),
        lambda g: X + g,
        lambda g: torch.relu(g),
    ):
        with pytest.raises((DataError, TypeError)):
            use(guard)


@pytest.mark.parametrize(
    "value", [Plain(3), "text", 3.0, None, torch.float32, Plain, np.float64(3)]
)
def test_what_holds_no_tensors_stays(value):
    assert part(value, slice(1)) is value
    check_cuttable(value, "inputs")
    assert sample_count(value) == 0


def test_different_numbers_of_samples():
    with pytest.raises(DataError, match=r"found \[4, 5\]"):
        sample_count({"x": X, "y": X[1:]})


def test_classes_that_pytorch_knows_how_to_take_apart():
    class Registered:
        def __init__(self, a):
            self.a = a

    torch.utils._pytree.register_pytree_node(
        Registered, lambda r: ([r.a], None), lambda children, _: Registered(*children)
    )
    assert torch.equal(map_tensors(lambda t: t + 1, Registered((X, X))).a[1], X + 1)
