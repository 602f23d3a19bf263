"""Forward hooks that note the calls of layers and modules in one forward pass."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradmask.containers import check_cuttable, tensors_in
from gradmask.errors import DataError
from gradmask.fisher.calls import LayerCall, ModuleCall, is_batched
from gradmask.fisher.rules import LayerRule, find_rule
from gradmask.fisher.scored import Wrapped


class Observer:
    """Hooks on the modules of a model that hold trainable parameters.

    Args:
        model: The model.
        names: Names of its trainable parameters by their ids.
        batch_size: Samples in the batch, dimension 0 of what is noted.

    Attributes:
        layers: Calls of layers that have a rule, by the names of their parameters.
        modules: Calls of other modules, inner modules first.
    """

    def __init__(self, model: nn.Module, names: dict[int, str], batch_size: int) -> None:
        self.layers: dict[str, list[LayerCall]] = defaultdict(list)
        self.modules: list[ModuleCall] = []
        self._names, self.batch_size = names, batch_size
        self._arguments: dict[nn.Module, list[Any]] = defaultdict(list)
        self._watching = True
        self._handles: list[Any] = []
        whole = (model, model.model) if isinstance(model, Wrapped) else (model,)
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue
            rule = find_rule(module)
            local = self._local_names(module, rule) if rule else {}
            if rule and local:
                # First in line: hooks of the user may change the output afterwards.
                self._watch(module, partial(self._note_layer, rule, local))
            if module not in whole and self._is_opaque(module, local):
                # Outside of all hooks of the user: they run again with the module.
                handle = module.register_forward_pre_hook(
                    self._note_arguments, prepend=True, with_kwargs=True
                )
                self._handles.append(handle)
                self._watch(module, self._note_module, last=True)

    def stop(self) -> None:
        """Note no more calls: some run layers again, as activation checkpointing does."""
        self._watching = False

    def remove(self) -> None:
        """Take the hooks off the model and forget the calls."""
        for handle in self._handles:
            handle.remove()
        self.layers.clear()
        self.modules.clear()
        self._arguments.clear()

    def _local_names(self, module: nn.Module, rule: LayerRule) -> dict[str, str]:
        """`{the layer's own name: the model's name}` of what its rule can measure."""
        return {
            local: self._names[id(p)]
            for local in rule.parameters
            if (p := module._parameters.get(local)) is not None and id(p) in self._names
        }

    def _is_opaque(self, module: nn.Module, local: dict[str, str]) -> bool:
        """Whether a module has parameters of its own, or below it, that no rule speaks for."""
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
            return False
        own = {name for name, p in module._parameters.items() if p is not None} - local.keys()
        reparametrised = hasattr(module, "parametrizations")
        return bool(reparametrised or any(id(module._parameters[n]) in self._names for n in own))

    def _watch(self, module: nn.Module, note: Any, *, last: bool = False) -> None:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._watching:
                note(module, args, kwargs, output)

        handle = module.register_forward_hook(hook, prepend=not last, with_kwargs=True)
        self._handles.append(handle)

    def _spans(self, value: Any) -> bool:
        return isinstance(value, Tensor) and is_batched(value, self.batch_size)

    def _note_layer(
        self, rule: LayerRule, names: dict[str, str], module: nn.Module, *found: Any
    ) -> None:
        args, kwargs, output = found
        simple = len(args) == 1 and not kwargs and self._spans(args[0]) and self._spans(output)
        if simple and output.grad_fn is not None and not output.is_complex():
            call = LayerCall(module, rule, dict(names), args[0], output)
            for name in names.values():
                self.layers[name].append(call)

    def _note_arguments(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._watching:
            self._arguments[module].append((args, kwargs))

    def _note_module(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        args, kwargs = self._arguments[module].pop()  # as they were before hooks of the user
        tensors = tensors_in((args, kwargs))
        try:
            check_cuttable((args, kwargs), "arguments")
        except DataError:  # a cache, which holds all samples
            return
        if tensors and all(map(self._spans, tensors)):
            call = ModuleCall(module, args, kwargs, output, self.batch_size)
            if call.edges:
                self.modules.append(call)
