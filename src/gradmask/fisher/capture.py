"""Squared per-sample gradients of a whole batch from one forward and one backward pass.

Forward hooks note each layer's input and the place of its output in the autograd graph. The
backward pass asks for gradients with respect to layer outputs only, so that the ordinary weight
gradients are never computed; hooks on the graph hand each output's gradient to the layer's rule.
Nothing of the model is changed, and all hooks go when the context ends.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

from gradmask.errors import ModelError
from gradmask.fisher.rules import LayerRule, chunk_size, find_rule, sum_of_squares


class Use:
    """One call of a layer: its input and, after a backward pass, the gradient of its output."""

    def __init__(self, module: nn.Module, rule: LayerRule, x: Tensor, output: Tensor) -> None:
        self.module, self.rule = module, rule
        self.x = x.detach()
        self.version = x._version
        self.edge = get_gradient_edge(output)
        self.entry = get_gradient_edge(x).node if x.requires_grad else None
        self.g: Tensor | None = None


class LayerCapture:
    """Hooks over a model for one batch; a context manager that always removes them.

    Args:
        model: The model, in eval mode.
        parameters: Trainable parameters by name.
        batch_size: Samples in the batch, dimension 0 of every layer's input and output.
        excluded: Names to leave alone.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        batch_size: int,
        excluded: set[str],
    ) -> None:
        self._names = {id(p): name for name, p in parameters.items() if name not in excluded}
        self._parameters = parameters
        self._batch_size = batch_size
        self._uses: list[Use] = []
        self._handles: list[Any] = []
        self._forward = True
        self._outside: Tensor | None = None
        self._single: set[nn.Module] = set()
        self._inputs: list[Any] = []
        self._lowest_uses: dict[Any, list[Use]] = defaultdict(list)
        self._totals: dict[str, Tensor] = {}
        self.captured: set[str] = set()
        self.handled: set[str] = set()
        self.mixed: set[str] = set()
        for module in model.modules():
            rule = find_rule(module)
            if rule is not None and self._local_names(module, rule):
                hook = self._forward_hook(rule)
                # First in line: hooks of the user may change the output afterwards.
                self._handles.append(
                    module.register_forward_hook(hook, prepend=True, with_kwargs=True)
                )

    def __enter__(self) -> LayerCapture:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._uses.clear()

    def _local_names(self, module: nn.Module, rule: LayerRule) -> dict[str, str]:
        """`{the layer's own name: the model's name}` of the parameters to be measured."""
        return {
            local: self._names[id(p)]
            for local in rule.parameters
            if (p := module._parameters.get(local)) is not None and id(p) in self._names
        }

    def _forward_hook(self, rule: LayerRule) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            # Activation checkpointing calls layers again during the backward pass.
            if not self._forward or len(args) != 1 or kwargs:
                return
            sized = all(
                isinstance(t, Tensor) and t.dim() and len(t) == self._batch_size
                for t in (args[0], output)
            )
            if sized and output.grad_fn is not None:
                self._uses.append(Use(module, rule, args[0], output))

        return hook

    def resolve(self, outputs: Any) -> None:
        """Decide which parameters the captured calls explain completely; the rest is not handled.

        A parameter is captured if every path from the outputs to it goes through a captured call
        of a layer that owns it, and not through that call's input: this finds weights that are
        also used outside their layer.

        Args:
            outputs: What the model returned.

        Raises:
            ModelError: If the outputs do not depend on the parameters, or hide their graph.
        """
        self._forward = False
        tensors = (t for t in tree_leaves(outputs) if isinstance(t, Tensor))
        roots = {t.grad_fn for t in tensors if t.grad_fn is not None}
        if not roots:
            raise ModelError("The model's outputs do not depend on its trainable parameters.")
        order, parents = _walk(roots)
        owners: dict[Any, set[int]] = defaultdict(set)
        entries: dict[Any, set[int]] = defaultdict(set)
        for use in self._uses:
            owned = {
                id(use.module._parameters[local])
                for local in self._local_names(use.module, use.rule)
            }
            owners[use.edge.node] |= owned
            entries[use.entry] |= owned
        reached = set()
        for node in order:
            variable = getattr(node, "variable", None)
            name = None if variable is None else self._names.get(id(variable))
            if name is not None:
                reached.add(name)
                if _enclosed(node, id(variable), owners, entries, parents, roots):
                    self.captured.add(name)
        # What the outputs do not depend on has gradient zero.
        self.handled = self.captured | (set(self._names.values()) - reached)
        self._choose_single()
        self._inputs = _lowest(order, {use.edge.node: use.edge for use in self._uses})
        self._place_hooks()

    def _place_hooks(self) -> None:
        """The lowest gradients are what autograd returns; a hook reads each of the others.

        Both come after any hook of the user on the same tensor, as the weight gradients do.
        """
        lowest = {edge.node for edge in self._inputs}
        for use in self._uses:
            if use.edge.node in lowest:
                self._lowest_uses[use.edge.node].append(use)
            else:
                self._handles.append(use.edge.node.register_prehook(partial(self._read, use)))

    def _read(self, use: Use, gradients: tuple[Tensor | None, ...]) -> None:
        self._receive(use, gradients[use.edge.output_nr])

    def _choose_single(self) -> None:
        """Layers called once, with no shared parameter, are squared as soon as possible."""
        calls = Counter(use.module for use in self._uses)
        sharing = Counter(
            name
            for m in calls
            for name in self._local_names(m, find_rule(m)).values()  # type: ignore[arg-type]
        )
        for use in self._uses:
            names = self._local_names(use.module, use.rule).values()
            if calls[use.module] == 1 and all(sharing[name] == 1 for name in names):
                self._single.add(use.module)

    def _receive(self, use: Use, g: Tensor | None) -> None:
        names = self._local_names(use.module, use.rule)
        if g is None:
            return
        if self._outside is not None:
            if g[self._outside.to(g.device)].count_nonzero():
                self.mixed |= set(names.values())
        elif not self.handled.isdisjoint(names.values()):
            g = g.detach()
            if use.x._version != use.version:
                raise ModelError(
                    f"The input of a {type(use.module).__name__} layer (parameters "
                    f"{', '.join(names.values())}) was overwritten in place before the backward "
                    "pass: make the operation that follows it out-of-place (inplace=False)."
                )
            if use.module in self._single:
                x, g = _full_precision(use.x), _full_precision(g)
                for local, squares in sum_of_squares(use.rule, use.module, x, g).items():
                    self._add(names.get(local), squares)
            else:
                use.g = g

    def _add(self, name: str | None, squares: Tensor) -> None:
        if name not in self.handled or name is None:
            return
        shape = self._parameters[name].shape
        if squares.shape != shape:
            raise ModelError(
                f"The rule of a layer gave {name!r} a gradient of shape {tuple(squares.shape)}: "
                f"expected {tuple(shape)}, after the dimension of the samples."
            )
        seen = name in self._totals
        self._totals[name] = self._totals[name].add_(squares) if seen else squares

    def _backward(self, term: Tensor) -> None:
        if not self._inputs:
            return
        # Only layer outputs are asked for: hooks on parameters and `.grad` stay out of it.
        gradients = torch.autograd.grad(term, self._inputs, retain_graph=True, allow_unused=True)
        with torch.no_grad():
            for edge, g in zip(self._inputs, gradients, strict=True):
                for use in self._lowest_uses[edge.node]:
                    self._receive(use, g)

    def check_samples(self, outputs: Any) -> set[str]:
        """Find parameters of layers where one sample's output reaches another sample's row.

        The outputs of one part of the samples must not reach the rows of the other part, and the
        other way round: then no row belongs to anything but its own part.

        Args:
            outputs: What the model returned.

        Returns:
            Names of parameters whose layers mix samples, or do not have the samples first.
        """
        n = self._batch_size
        tensors = [
            t
            for t in tree_leaves(outputs)
            if isinstance(t, Tensor) and t.grad_fn is not None and t.dim() and len(t) == n
        ]
        # The Thue-Morse sequence: parts that no period in the order of the rows respects.
        odd = torch.tensor([i.bit_count() % 2 == 1 for i in range(n)])
        for inside in (odd, ~odd):
            parts = [t[inside.to(t.device)].reshape(-1) for t in tensors]
            # Unequal weights: a plain sum has gradient zero behind a softmax.
            terms = [(t * torch.arange(1, len(t) + 1, device=t.device).cos()).sum() for t in parts]
            if terms:
                self._outside = ~inside
                self._backward(torch.stack(terms).sum())
        self._outside = None
        return self.mixed

    def squared_sums(self, terms: Iterable[Tensor]) -> dict[str, Tensor]:
        """Sum, over samples and terms, of the squared per-sample gradients of each handled name.

        Args:
            terms: Scalars, each a sum over the samples of that sample's own value.

        Returns:
            `{name: tensor of the parameter's shape}`; absent names are zero.
        """
        self.handled -= self.mixed
        for term in terms:
            self._backward(term)
            with torch.no_grad():
                self._square_shared()
        return self._totals

    def _square_shared(self) -> None:
        """Layers called twice and tied weights: sum a sample's gradient over uses, then square."""
        uses = [use for use in self._uses if use.g is not None]
        if not uses:
            return
        names = {n for u in uses for n in self._local_names(u.module, u.rule).values()}
        chunk = chunk_size(self._parameters[name] for name in names)
        for start in range(0, self._batch_size, chunk):
            samples = slice(start, start + chunk)
            sums: dict[str, Tensor] = {}
            for use in uses:
                assert use.g is not None
                x, g = _full_precision(use.x[samples]), _full_precision(use.g[samples])
                local_names = self._local_names(use.module, use.rule)
                for local, gradient in use.rule.per_sample(use.module, x, g).items():
                    if name := local_names.get(local):
                        sums[name] = sums[name] + gradient if name in sums else gradient
            for name, gradient in sums.items():
                self._add(name, gradient.square().sum(0))
        for use in uses:
            use.g = None


def _full_precision(tensor: Tensor) -> Tensor:
    """Squares of half-precision gradients underflow: work them out in float32."""
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.float() if half else tensor


def _walk(roots: set[Any]) -> tuple[list[Any], dict[Any, list[Any]]]:
    """All nodes below the roots, children before parents, and the parents of each."""
    order: list[Any] = []
    parents: dict[Any, list[Any]] = {root: [] for root in roots}
    stack: list[tuple[Any, bool]] = [(root, False) for root in roots]
    opened: set[Any] = set()
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in opened:
            opened.add(node)
            if node.name() == "CheckpointFunctionBackward":
                raise ModelError(
                    "Reentrant activation checkpointing hides the layers inside it: "
                    "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
                )
            stack.append((node, True))
            for child, _ in node.next_functions:
                if child is not None:
                    parents.setdefault(child, []).append(node)
                    stack.append((child, False))
    return order, parents


def _enclosed(
    leaf: Any,
    parameter: int,
    owners: dict[Any, set[int]],
    entries: dict[Any, set[int]],
    parents: dict[Any, list[Any]],
    roots: set[Any],
) -> bool:
    """Whether every path from a parameter up to the outputs meets a call of its own layer.

    A path that meets the call by way of its input comes from some other use of the parameter.
    """
    stack, seen = [leaf], {leaf}
    while stack:
        node = stack.pop()
        if parameter in owners.get(node, ()):
            continue
        if node in roots or parameter in entries.get(node, ()):
            return False
        for parent in parents[node]:
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return True


def _lowest(order: list[Any], edges: dict[Any, Any]) -> list[Any]:
    """Captured edges with no captured edge below: asking for these runs all the others."""
    contains: dict[Any, bool] = {}
    lowest = []
    for node in order:
        below = any(contains[child] for child, _ in node.next_functions if child is not None)
        if node in edges and not below:
            lowest.append(edges[node])
        contains[node] = below or node in edges
    return lowest
