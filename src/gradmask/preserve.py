"""What a measuring pass must not change in a model, put back bit for bit."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradmask.distributed import is_sharded, local
from gradmask.errors import ModelError

_SLOTS = ("_parameters", "_buffers", "_modules")
_COPIED = 1 << 31  # bytes of parameters that are copied for the first forward pass,
_KEPT = 1 << 24  # and for all of them
_LONG = 10_000  # entries of a container that are looked into
_HOOKS = {name for name in vars(nn.Module()) if "hook" in name}
_OBJECTS = 2  # levels of objects below a module's attributes whose own attributes are noted


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put back what forward passes change: buffers, attributes, and parameters.

    Attributes are put back as far as they are tensors and random generators, and lists, dicts, sets
    and simple objects of these. Parameters are compared after the first forward pass, since a
    copy of all would cost memory for longer; layers known to rewrite theirs are copied, and models
    of more than 2 GiB not even for that.

    Args:
        model: Any module; its parameters and buffers stay the same objects.

    Raises:
        ModelError: If a later forward pass rewrote parameters, so that they cannot be put back.
    """
    versions = {name: (p, p._version) for name, p in model.named_parameters()}
    sharded = any(is_sharded(p) for p, _ in versions.values())  # fully_shard changes slots itself
    noted = _Noted(model, {id(p) for p, _ in versions.values()}, slots=not sharded)
    first = None if sharded or noted.small else _FirstCall(model, noted)
    try:
        yield
    finally:
        if first is not None:
            first.end()
        rewritten = [name for name, (p, version) in versions.items() if p._version != version]
        noted.put_back()
    copied = {id(tensor) for tensor, _ in noted.tensors}
    lost = [name for name in rewritten if id(versions[name][0]) not in copied]
    if lost and not sharded:
        raise ModelError(
            f"The model's forward pass rewrites its own parameter {lost[0]!r}, and there is no "
            "copy to put it back from: keep such changes out of eval mode."
        )


class _Noted:
    """The state of a model's modules: tensors with copies, and containers with their contents."""

    def __init__(self, model: nn.Module, parameters: set[int], *, slots: bool) -> None:
        self.tensors: list[tuple[Tensor, Tensor]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        self._modes: list[tuple[nn.Module, bool]] = []
        self._seen = set(parameters)
        self._modules, self._slots = set(model.modules()), slots
        self.small = sum(p.nbytes for p in model.parameters()) <= _KEPT
        for module in model.modules():
            self._note_module(module, small=self.small)

    def _note_module(self, module: nn.Module, *, small: bool) -> None:
        for buffer in module.buffers(recurse=False):
            self._note(buffer, 0)
        if small or getattr(module, "max_norm", None) is not None:  # which shrinks its own rows
            self.tensors += [(p, _copy(p)) for p in module.parameters(recurse=False)]
        if not self._slots or isinstance(module, torch.jit.ScriptModule):
            return
        self._containers += [(module.__dict__[s], dict(module.__dict__[s])) for s in _SLOTS]
        attributes = {k: v for k, v in vars(module).items() if not _is_own(k)}
        self._containers.append((module, attributes))
        for name, value in attributes.items():
            if name not in _HOOKS:
                self._note(value, 0)
            elif isinstance(value, dict):  # hooks of a forward pass go, those of the user stay
                self._containers.append((value, dict(value)))

    def _note(self, value: Any, depth: int) -> None:
        if id(value) in self._seen:
            return
        inner: list[Any] = []
        if isinstance(value, Tensor):
            if value.layout == torch.strided and value.grad_fn is None and not value.is_meta:
                self.tensors.append((value, _copy(value)))
        elif isinstance(value, torch.Generator):
            self._generators.append((value, value.get_state()))
        elif isinstance(value, nn.Module):  # one that is not registered
            self._seen.add(id(value))
            for module in value.modules():
                if module not in self._modules:
                    self._modules.add(module)
                    self._note_module(module, small=True)
                    self._modes.append((module, module.training))
        elif isinstance(value, tuple):
            inner = list(value[:_LONG])
        elif isinstance(value, list | deque | set):
            self._containers.append((value, copy.copy(value)))
            inner = list(value) if len(value) <= _LONG else []
        elif isinstance(value, dict):
            self._containers.append((value, dict(value)))
            inner = list(value.values()) if len(value) <= _LONG else []
        elif depth < _OBJECTS and _is_simple(value):
            self._containers.append((vars(value), dict(vars(value))))
            inner, depth = list(vars(value).values()), depth + 1
        else:
            return
        self._seen.add(id(value))
        for v in inner:
            self._note(v, depth)

    def put_back(self) -> None:
        """Put everything back; what has not changed is not written to."""
        for container, before in reversed(self._containers):
            _put_back(container, before)
        with torch.no_grad():
            for tensor, before in self.tensors:
                if tensor.shape != before.shape:
                    tensor.data = before
                elif not _same(tensor, before):
                    tensor.detach().copy_(before)
        for module, training in self._modes:
            module.training = training
        for generator, state in self._generators:
            generator.set_state(state)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _same(tensor: Tensor, before: Tensor) -> bool:
    """Whether two tensors have the same bits, NaN or not; of one in shards, this rank's part."""
    now, before = local(tensor.detach()), local(before)
    if torch.equal(now, before):
        return True
    return bool((now.isnan() & before.isnan() | (now == before)).all())


def _is_own(name: str) -> bool:
    """Attributes of `nn.Module` that are put back elsewhere."""
    return name in _SLOTS or name == "training"


def _is_simple(value: Any) -> bool:
    """An instance of a class of the user's: no module, function, type or part of a library."""
    kind = type(value)
    library = kind.__module__.partition(".")[0] in ("torch", "builtins", "functools", "weakref")
    return hasattr(value, "__dict__") and not (library or isinstance(value, nn.Module | type))


def _put_back(container: Any, before: Any) -> None:
    if isinstance(container, nn.Module):
        now = vars(container)
        for name in [k for k in now if k not in before and not _is_own(k)]:
            del now[name]
        now.update({k: v for k, v in before.items() if k not in now or now[k] is not v})
    elif isinstance(container, dict):
        if list(container) != list(before) or any(container[k] is not v for k, v in before.items()):
            container.clear()
            container.update(before)
    elif len(container) != len(before) or any(
        a is not b for a, b in zip(container, before, strict=True)
    ):
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(before)


class _FirstCall:
    """Hooks around a model's first call that note the parameters which it rewrites."""

    def __init__(self, model: nn.Module, noted: _Noted) -> None:
        self._model, self._noted = model, noted
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._handles = [
            model.register_forward_pre_hook(self._before, prepend=True),
            model.register_forward_hook(self.end, always_call=True),
        ]

    def _before(self, *_: Any) -> None:
        parameters = [p for p in self._model.parameters() if not p.is_meta]
        if sum(p.nbytes for p in parameters) <= _COPIED:
            self._copies += [(p, _copy(p)) for p in parameters]

    def end(self, *_: Any) -> None:
        """After the call, or when it was interrupted, which runs no hooks."""
        for handle in self._handles:
            handle.remove()
        changed = [(p, c) for p, c in self._copies if not _same(p, c)]
        self._noted.tensors += changed
        self._copies.clear()
