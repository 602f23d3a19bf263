"""Calls of modules in a forward pass, and the per-sample gradients that follow from them.

Two kinds: a call of a layer that has a rule, and a call of any other module, which is run again for
one sample at a time, by itself and not with the whole network. What lies between the two, single
operations on bare parameters, is in `operations`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gradmask.containers import map_tensors, tensors_in
from gradmask.errors import ModelError
from gradmask.fisher.graph import Node
from gradmask.fisher.rules import LayerRule, Product, add_squares, chunk_size

ALL = slice(None)


class Unmeasurable(Exception):
    """A module cannot be run again by itself for one sample."""


class Call:
    """One use of parameters in a forward pass.

    Attributes:
        names: `{the call's own name: the model's name}` of the parameters it explains.
        edges: Places in the graph whose gradients it needs.
        gradients: Those gradients, after a backward pass.
        inputs: Nodes of the inputs.
        kind: `rule`, `matmul`, `elementwise`, `lookup`, `derived` or `module`, and what tells the
            call from others of its kind.
    """

    kind: tuple[Any, ...]
    adds_moments = False  # whether it has `add_moments`

    def __init__(self, names: dict[str, str], edges: list[GradientEdge]) -> None:
        self.names, self.edges = names, edges
        self.gradients: list[Tensor | None] = [None] * len(edges)
        self.inputs: set[Node] = set()

    def per_sample(self, samples: slice) -> dict[str, Tensor]:
        """Per-sample gradients `{model's name: (n, *shape)}` of some of the samples."""
        raise NotImplementedError

    def rows(self, gradient: Tensor) -> Tensor:
        """The gradient of an output with the samples in dimension 0."""
        return gradient

    def explains(self, name: str, parameter: nn.Parameter) -> None:
        """Take note that the call is the one to measure a parameter."""

    def keep(self) -> None:
        """Keep what the graph holds until its backward pass is over, for `per_sample` after it."""

    def release(self) -> None:
        """Let go of the graph, and of what came in."""
        self.edges, self.inputs = [], set()

    def add_squares(self, totals: dict[str, Tensor], samples: slice = ALL) -> bool:
        """Add the squares over samples to `{model's name: total}`; False if it cannot."""
        return False

    def add_moments(self, totals: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
        """Add the squares over samples to totals, and the gradients themselves to sums, likewise.

        Only of a call that `adds_moments`.
        """
        raise NotImplementedError


class LayerCall(Call):
    """A call of a layer that has a rule: one input, one output, both with the samples first."""

    def __init__(
        self, module: nn.Module, rule: LayerRule, names: dict[str, str], x: Tensor, output: Tensor
    ) -> None:
        super().__init__(names, [edge_of(output)])
        self.kind = ("rule", id(module))
        self.module, self.rule = module, rule
        self.x, self.version = x.detach(), x._version
        if x.requires_grad:
            self.inputs = {edge_of(x).node}

    def pair(self, samples: slice = ALL) -> tuple[Tensor, Tensor]:
        """Inputs of some samples, and the gradients of what became of them."""
        _check_version(self.module, self.names, self.x, self.version)
        g = self.gradients[0]
        assert g is not None
        return full_precision(self.x[samples]), full_precision(g[samples])

    def per_sample(self, samples: slice) -> dict[str, Tensor]:
        """By the rule."""
        return self._named(self.rule.per_sample(self.module, *self.pair(samples)))

    def add_squares(self, totals: dict[str, Tensor], samples: slice = ALL) -> bool:
        """By the rule's cheapest way."""
        if self.rule.add_squares is None:
            square_together([self], totals, len(self.x), samples)
        else:
            self.rule.add_squares(self.module, *self.pair(samples), self._own(totals))
        return True

    @property
    def adds_moments(self) -> bool:  # type: ignore[override]
        """Whether the rule has its own way to both moments."""
        return self.rule.add_moments is not None

    def add_moments(self, totals: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
        """By the rule's way."""
        assert self.rule.add_moments is not None
        self.rule.add_moments(self.module, *self.pair(), self._own(totals), self._own(sums))

    def weigh_squares(self, weights: dict[str, Tensor], samples: slice = ALL) -> Tensor | None:
        """Each sample's weighted sum of squares, by the rule's way; None if it has none."""
        if self.rule.weigh_squares is None:
            return None
        return self.rule.weigh_squares(self.module, *self.pair(samples), self._own(weights))

    def as_product(self, samples: slice = ALL) -> Product | None:
        """The gradients of weight and bias as products of matrices, where the layer has them so."""
        rule = self.rule.as_product
        return None if rule is None else rule(self.module, *self.pair(samples))

    def release(self) -> None:
        """Of the input, too: nobody else may need it any longer."""
        super().release()
        self.x = self.x.new_empty(0)

    def release_graph(self) -> int:
        """Let go of the graph alone, after the backward pass; return the bytes that are kept."""
        self.edges, self.inputs = [], set()
        g = self.gradients[0]
        assert g is not None
        return self.x.nbytes + g.nbytes

    def _own(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """By the layer's own names."""
        return {local: tensors[name] for local, name in self.names.items()}

    def _named(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {self.names[local]: t for local, t in tensors.items() if local in self.names}


class ModuleCall(Call):
    """A call of a module without a rule: run again for one sample at a time, with autograd."""

    def __init__(self, module: nn.Module, args: Any, kwargs: Any, result: Any, n: int) -> None:
        outputs = differentiable(result)
        self.places = [i for i, t in enumerate(outputs) if is_batched(t, n)]
        super().__init__({}, [get_gradient_edge(outputs[i]) for i in self.places])
        self.kind = ("module", id(module), len(self.edges))
        self.module, self.arguments, self.batch_size = module, (args, kwargs), n
        self.others = {get_gradient_edge(t).node for t in outputs if not is_batched(t, n)}
        tensors = tensors_in(self.arguments)
        self.versions = [(t, t._version) for t in tensors]
        self.inputs = {get_gradient_edge(t).node for t in tensors if t.requires_grad}

    def explains(self, name: str, parameter: nn.Parameter) -> None:
        """Take note of the parameter's name inside the module."""
        local = next(n for n, p in self.module.named_parameters() if p is parameter)
        self.names[local] = name

    def is_sound(self, parents: dict[Node, list[Node]]) -> bool:
        """Whether nothing but the outputs with samples is used, and none is made from another."""
        nodes = {edge.node for edge in self.edges}
        if any(node in parents for node in self.others):
            return False
        stack = [p for node in nodes for p in parents.get(node, ())]
        seen = set(stack)
        while stack and len(nodes) > 1:
            node = stack.pop()
            if node in nodes:
                return False
            fresh = [p for p in parents[node] if p not in seen]
            seen.update(fresh)
            stack += fresh
        return True

    def per_sample(self, samples: slice) -> dict[str, Tensor]:
        """By autograd through this module alone."""
        for tensor, version in self.versions:
            _check_version(self.module, self.names, tensor, version)
        parameters = dict(self.module.named_parameters())
        wanted = [parameters[local] for local in self.names]
        rows = range(*samples.indices(self.batch_size))
        found: list[list[Tensor]] = [[] for _ in wanted]
        for n in rows:
            for row, gradient in zip(found, self._gradients(n, wanted), strict=True):
                row.append(full_precision(gradient))
        return {name: torch.stack(f) for name, f in zip(self.names.values(), found, strict=True)}

    def _gradients(self, n: int, wanted: list[nn.Parameter]) -> list[Tensor]:
        sample = slice(n, n + 1)
        args, kwargs = map_tensors(lambda t: t.detach()[sample], self.arguments)
        try:
            with torch.enable_grad():
                outputs = differentiable(self.module(*args, **kwargs))
                pairs = [
                    (outputs[place], g[sample])
                    for place, g in zip(self.places, self.gradients, strict=True)
                    if g is not None
                ]
        except Exception as error:  # what it was given were no samples, or it keeps some state
            raise Unmeasurable from error
        found = torch.autograd.grad(
            [out for out, _ in pairs],
            wanted,
            [g for _, g in pairs],
            allow_unused=True,
        )
        return [
            torch.zeros_like(p) if g is None else g.to_dense()
            for p, g in zip(wanted, found, strict=True)
        ]


def per_sample_together(calls: Sequence[Call], samples: slice) -> dict[str, Tensor]:
    """Per-sample gradients `{model's name: (n, *shape)}`, summed over a parameter's uses."""
    sums: dict[str, Tensor] = {}
    for call in calls:
        for name, gradient in call.per_sample(samples).items():
            sums[name] = sums[name] + gradient if name in sums else gradient
    return sums


def square_together(
    calls: Sequence[Call], totals: dict[str, Tensor], n: int, samples: slice = ALL
) -> None:
    """Add squares of per-sample gradients: summed over a parameter's uses, then squared.

    Args:
        calls: Calls with gradients; a name may be in several of them.
        totals: `{name: tensor of the parameter's shape}`, changed in place.
        n: Samples in the batch.
        samples: Those to add.

    Raises:
        ModelError: If a rule gives a gradient of a wrong shape.
    """
    names = {name for call in calls for name in call.names.values()}
    chunk = chunk_size(totals[name] for name in names)
    start, stop, step = samples.indices(n)
    for first in range(start, stop, chunk * step):
        sums = per_sample_together(calls, slice(first, min(first + chunk * step, stop), step))
        for name, gradient in sums.items():
            if gradient.shape[1:] != totals[name].shape:
                raise ModelError(
                    f"The rule of a layer gave {name!r} a gradient of shape "
                    f"{tuple(gradient.shape[1:])}: expected {tuple(totals[name].shape)}, after the "
                    "dimension of the samples."
                )
            add_squares(totals[name], gradient)


def edge_of(tensor: Tensor) -> GradientEdge:
    """As `get_gradient_edge`, quicker where an operation made the tensor."""
    if tensor.grad_fn is None:
        return get_gradient_edge(tensor)
    return GradientEdge(tensor.grad_fn, tensor.output_nr)


def full_precision(tensor: Tensor) -> Tensor:
    """Squares of half-precision gradients underflow: work them out in float32."""
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.float() if half else tensor


def unequal_sums(outputs: Tensor) -> Tensor:
    """Sums (N,) of each sample's entries, unequally weighted: a plain one is flat in softmaxes."""
    real = torch.view_as_real(outputs) if outputs.is_complex() else outputs
    rows = real.reshape(len(outputs), -1)
    return rows @ torch.arange(1, rows.shape[1] + 1, device=rows.device).cos().to(rows)


def is_batched(tensor: Tensor, batch_size: int) -> bool:
    """Whether dimension 0 is as long as the batch."""
    return tensor.dim() > 0 and len(tensor) == batch_size


def differentiable(outputs: Any) -> list[Tensor]:
    """The tensors of a nested output that carry a graph."""
    return [t for t in tensors_in(outputs) if t.grad_fn is not None]


def _check_version(module: nn.Module, names: dict[str, str], tensor: Tensor, version: int) -> None:
    if tensor._version != version:
        raise ModelError(
            f"The input of a {type(module).__name__} layer (parameters "
            f"{', '.join(names.values())}) was overwritten in place before the backward "
            "pass: make the operation that follows it out-of-place (inplace=False)."
        )
