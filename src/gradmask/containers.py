"""Nested containers of tensors: batches, and what models return.

Tuples, lists, named tuples, dicts and their subclasses, dataclasses, and what is registered with
PyTorch's pytrees can be cut into samples. What cannot, such as a plain class with tensors inside,
is kept away from whoever wants one sample of it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from gradmask.errors import DataError

Change = Callable[[Tensor], Any]
_PLAIN = (str, bytes, int, float, complex, type(None), type, torch.dtype, torch.device, torch.Size)


class Uncut:
    """Stands for an object that cannot be cut into samples; raises as soon as it is used.

    Args:
        kind: Name of the object's type.
    """

    def __init__(self, kind: str) -> None:
        object.__setattr__(self, "_kind", kind)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        kind = object.__getattribute__(self, "_kind")
        raise DataError(
            f"A {kind} cannot be cut into samples: use a tensor, tuple, list, dict or dataclass of "
            "tensors, or register the class with torch.utils._pytree.register_pytree_node."
        )

    __getattr__ = __getitem__ = __iter__ = __len__ = __call__ = __bool__ = _refuse

    @classmethod
    def __torch_function__(cls, *given: Any, **_: Any) -> Any:
        """PyTorch's functions use it as well."""
        guards = [value for values in given if isinstance(values, tuple) for value in values]
        return next(value for value in guards if isinstance(value, Uncut))._refuse()


def map_tensors(change: Change, value: Any, opaque: Callable[[Any], Any] = lambda v: v) -> Any:
    """Rebuild a nested container with every tensor changed.

    Args:
        change: What becomes of a tensor.
        value: Any nested container.
        opaque: What becomes of an object with tensors inside that cannot be rebuilt.

    Returns:
        A container of the same form; what holds no tensors is the same object.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, _PLAIN):
        return value
    again = lambda v: map_tensors(change, v, opaque)  # noqa: E731
    if type(value) is dict:
        return {key: again(v) for key, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(again, value))
    if isinstance(value, PackedSequence):  # its rows are not samples
        return opaque(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(again, value))
    try:
        if isinstance(value, MutableMapping):  # its own class, whatever its constructor takes
            return _copied_mapping(value, again) or opaque(value)
        if dataclasses.is_dataclass(value):
            new: Any = copy.copy(value)
            names = {f.name for f in dataclasses.fields(value)} | set(
                getattr(value, "__dict__", ())
            )
            for name in names:
                if hasattr(value, name):  # frozen ones too
                    object.__setattr__(new, name, again(getattr(value, name)))
            return new
        if type(value) in pytree.SUPPORTED_NODES:
            children, form = pytree.tree_flatten(value, is_leaf=lambda v: v is not value)
            return pytree.tree_unflatten(list(map(again, children)), form)
        if isinstance(value, tuple | list):
            return type(value)(map(again, value))
    except (TypeError, AttributeError, NotImplementedError):
        return opaque(value)
    return opaque(value) if _holds_tensors(value) else value


def _copied_mapping(value: Any, again: Callable[[Any], Any]) -> Any:
    """A copy with other values, in its attributes too; None if it shares them with the original."""
    new = copy.copy(value)
    entries = dict(value.items())
    for key, v in entries.items():
        new[key] = again(v)
        if value[key] is not v:
            value[key] = v
            return None
    for name, v in getattr(value, "__dict__", {}).items():
        if name not in entries and name != "data":
            vars(new)[name] = again(v)
    return new


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of a nested container, in order; none of an object that cannot be cut.

    Args:
        value: Any nested container.
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (*_PLAIN, PackedSequence)):
        return []
    if isinstance(value, MutableMapping):
        inner = list(value.values())
    elif isinstance(value, tuple | list):
        inner = list(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = [getattr(value, f.name, None) for f in dataclasses.fields(value)]
    elif type(value) in pytree.SUPPORTED_NODES:
        inner = pytree.tree_leaves(value, is_leaf=lambda v: v is not value)
    else:
        inner = []
    return [tensor for v in inner for tensor in tensors_in(v)]


def part(batch: Any, which: slice | list[int]) -> Any:
    """Samples `which` of every tensor in a nested batch; what cannot be cut raises when used.

    Args:
        batch: Tensors with the samples in dimension 0; those without a dimension stay.
        which: The samples.
    """
    cut = lambda t: t[which] if t.dim() else t  # noqa: E731
    return map_tensors(cut, batch, lambda v: Uncut(type(v).__name__))


def sample_count(batch: Any) -> int:
    """Number of samples in a batch: the length of dimension 0 of all its tensors.

    Args:
        batch: Any nested container; tensors without a dimension do not count.

    Raises:
        DataError: If tensors differ in it.
    """
    sizes = {len(t) for t in tensors_in(batch) if t.dim()}
    if len(sizes) > 1:
        raise DataError(
            f"A batch must hold tensors with the same number of samples; found {sorted(sizes)}. "
            "Dimension 0 is the samples, of targets too: (samples, positions), not flattened."
        )
    return sizes.pop() if sizes else 0


def check_cuttable(batch: Any, what: str) -> None:
    """Raise a DataError that names an object in a batch that cannot be cut into samples.

    Args:
        batch: The batch.
        what: What it is, for the message.
    """

    def refuse(value: Any) -> Any:
        raise DataError(
            f"The {what} hold a {type(value).__name__}, which cannot be cut into samples: use a "
            "tensor, tuple, list, dict or dataclass of tensors."
        )

    map_tensors(lambda t: t, batch, refuse)


def _holds_tensors(value: Any, depth: int = 3) -> bool:
    """Whether an object of an unknown class has tensors (or NumPy arrays) inside."""
    if isinstance(value, Tensor) or (hasattr(value, "__array__") and value.__array__().ndim > 0):
        return True
    if depth == 0 or isinstance(value, _PLAIN):
        return False
    return any(_holds_tensors(v, depth - 1) for v in _contents(value))


def _contents(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, tuple | list | set | frozenset):
        yield from value
    else:
        yield from getattr(value, "__dict__", {}).values()
        for cls in type(value).__mro__:
            slots = getattr(cls, "__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                yield getattr(value, slot, None)


def entry(outputs: Any, name: str) -> Any:
    """What a model returned by that name, in a dict or as an attribute; None if there is none."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
