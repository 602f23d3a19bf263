"""One forward pass of training, and the squares that its backward pass gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradmask.distributed import is_sharded
from gradmask.fisher.calls import differentiable, full_precision
from gradmask.fisher.capture import Capture
from gradmask.fisher.graph import leaves, walk
from gradmask.fisher.reference import Squares
from gradmask.fisher.rules import add_squares
from gradmask.fisher.scale import loss_scale
from gradmask.fisher.sharded import ShardSums


class Step:
    """One forward pass, and what its backward pass gives."""

    def __init__(
        self, capture: Capture | SingleCapture, parameters: dict[str, nn.Parameter], count: int
    ) -> None:
        self.capture, self.parameters, self.count = capture, parameters, count
        self.roots: list[Any] = []
        self.sharded = any(map(is_sharded, parameters.values()))
        self.squares = ShardSums(parameters) if self.sharded else Squares(parameters)
        self.scale: Tensor | None = None
        self.started = self.counted = self.may_overflow = False
        self.probe: Callable[[], None] | None = None  # finds out how to measure batches like this
        self.mark()

    def note_scale(
        self, logits: Tensor, index: int, likelihood: str, gradients: tuple[Tensor | None, ...]
    ) -> None:
        """What the loss multiplies a sample's own by."""
        gradient = gradients[index]
        if gradient is not None and gradient.shape == logits.shape:
            with torch.no_grad():
                self.scale = loss_scale(logits, gradient, likelihood)

    def mark(self) -> None:
        """Note the gradients that there are."""
        self._before = {name: _mark(p) for name, p in self.parameters.items()}

    def trained(self) -> bool:
        """Whether parameters got gradients since: else a backward pass was for other ends.

        Of parameters in shards it is not known yet when the pass ends.
        """
        if self.sharded:
            return True
        now = {name: _mark(p) for name, p in self.parameters.items() if p.grad is not None}
        return any(mark != self._before[name] for name, mark in now.items())


def _mark(parameter: nn.Parameter) -> tuple[int, int]:
    return (0, 0) if parameter.grad is None else (id(parameter.grad), parameter.grad._version)


class SingleCapture:
    """What `Capture` is, for one sample: its gradients are those of the batch, by way of the model.

    What a loss has of parameters besides, such as a penalty, does not go by that way.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self._parameters, self._handles = parameters, list[Any]()
        self._uses: dict[str, list[tuple[Any, int]]] = {}
        self._sums: dict[str, Tensor] = {}
        self._types: set[torch.dtype] = set()
        self.handled = parameters.keys()

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._uses, self._sums = {}, {}

    def resolve(self, outputs: Any) -> None:
        """Find the operations that use the parameters, and refuse a graph with hidden parts."""
        nodes, parents = walk(list(dict.fromkeys(t.grad_fn for t in differentiable(outputs))))
        self._types = {m.dtype for node in nodes for m in node._input_metadata}
        names = {id(p): name for name, p in self._parameters.items()}
        for name, leaf in leaves(nodes, lambda variable: names.get(id(variable))).items():
            self._uses[name] = [
                (node, index)
                for node in dict.fromkeys(parents[leaf])
                for index, (below, _) in enumerate(node.next_functions)
                if below is leaf
            ]

    def types(self) -> set[torch.dtype]:
        """Types of what operations returned."""
        return self._types

    def listen(self, totals: dict[str, Tensor]) -> None:
        """Add the squares of the next backward pass to totals; complete after `square_rest`."""

        @torch.no_grad()
        def add(name: str, index: int, gradients: tuple[Tensor | None, ...], *_: Any) -> None:
            if (g := gradients[index]) is None:
                return
            g = full_precision(g.to_dense()).sum_to_size(self._parameters[name].shape)
            if len(self._uses[name]) == 1:
                add_squares(totals[name], g.unsqueeze(0))
            else:
                self._sums[name] = self._sums[name] + g if name in self._sums else g

        for name, uses in self._uses.items():
            self._handles += [node.register_hook(partial(add, name, i)) for node, i in uses]

    def square_rest(self, totals: dict[str, Tensor]) -> None:
        """Of parameters that are used more than once."""
        for name, gradient in self._sums.items():
            add_squares(totals[name], gradient.unsqueeze(0))


class Hook:
    """A hook that does nothing in a copy or a file of the model, unless a collector comes with it.

    Args:
        function: What is called.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        """Call it."""
        self.function(*args)

    def __reduce__(self) -> Any:
        return Hook, (_nothing,)


def _nothing(*_: Any) -> None:
    """Stands for a hook in a copy."""
