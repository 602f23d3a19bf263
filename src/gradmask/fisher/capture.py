"""Squared per-sample gradients of a whole batch from one forward and one backward pass.

Forward hooks note each layer's input and the place of its output in the autograd graph. The
backward pass asks for gradients with respect to layer outputs only, so that the ordinary weight
gradients are never computed; a hook on each output hands the gradient to the layer's rule.
Nothing of the model is changed, and all hooks go when the context ends.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
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
        self.module, self.rule, self.x = module, rule, x
        self.version = x._version
        self.edge = get_gradient_edge(output)
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
        self._check = False
        self._single: set[nn.Module] = set()
        self._totals: dict[str, Tensor] = {}
        self.handled: set[str] = set()
        self.mixed: set[str] = set()
        for module in model.modules():
            rule = find_rule(module)
            if rule is not None and self._local_names(module, rule):
                hook = self._forward_hook(rule)
                # First in line: hooks of the user may change the output afterwards.
                self._handles.append(module.register_forward_hook(hook, prepend=True))

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
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # Activation checkpointing calls layers again during the backward pass.
            if not self._forward or not isinstance(output, Tensor) or output.grad_fn is None:
                return
            if len(args) != 1 or len(args[0]) != self._batch_size or len(output) != len(args[0]):
                return
            use = Use(module, rule, args[0].detach(), output)
            self._uses.append(use)
            self._handles.append(output.register_hook(lambda g: self._receive(use, g)))

        return hook

    def resolve(self, outputs: Any) -> None:
        """Decide which parameters the captured calls explain completely; the rest is not handled.

        A parameter is handled if every path from the outputs to it goes through a captured call
        of a layer that owns it: this finds weights that are also used outside their layer.

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
        for use in self._uses:
            owners[use.edge.node] |= {
                id(use.module._parameters[local])
                for local in self._local_names(use.module, use.rule)
            }
        reached = set()
        for node in order:
            variable = getattr(node, "variable", None)
            name = None if variable is None else self._names.get(id(variable))
            if name is not None:
                reached.add(name)
                if _enclosed(node, id(variable), owners, parents, roots):
                    self.handled.add(name)
        # What the outputs do not depend on has gradient zero.
        self.handled |= set(self._names.values()) - reached
        self._choose_single()
        self._inputs = _lowest(order, {use.edge.node: use.edge for use in self._uses})

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

    def _receive(self, use: Use, g: Tensor) -> None:
        names = self._local_names(use.module, use.rule)
        if self._check:
            if g[1:].count_nonzero():
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
        if name in self.handled and name is not None:
            seen = name in self._totals
            self._totals[name] = self._totals[name].add_(squares) if seen else squares

    def _backward(self, term: Tensor) -> None:
        if self._inputs:
            # A user's tensor hooks and retain_grad stay out of it: only `inputs` are asked for.
            torch.autograd.grad(term, self._inputs, retain_graph=True, allow_unused=True)

    def check_samples(self, outputs: Any) -> set[str]:
        """Find parameters of layers where one sample's output reaches another sample's row.

        Args:
            outputs: What the model returned.

        Returns:
            Names of parameters whose layers mix samples, or do not have the samples first.
        """
        tensors = [
            t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.grad_fn is not None
        ]
        first = [t[0].reshape(-1) for t in tensors if t.dim() and len(t) == self._batch_size]
        # Unequal weights: a plain sum has gradient zero behind a softmax.
        terms = [(t * torch.arange(1, len(t) + 1, device=t.device).cos()).sum() for t in first]
        if terms:
            self._check = True
            self._backward(torch.stack(terms).sum())
            self._check = False
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
    parents: dict[Any, list[Any]],
    roots: set[Any],
) -> bool:
    """Whether every path from a parameter up to the outputs meets a call of its own layer."""
    stack, seen = [leaf], {leaf}
    while stack:
        node = stack.pop()
        if parameter in owners.get(node, ()):
            continue
        if node in roots:
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
