"""Squared per-sample gradients of a whole batch from one forward and one backward pass.

Forward hooks note the calls of layers; the autograd graph tells which of them, or which single
operations, explain a parameter completely. The backward pass asks for gradients with respect to
their outputs only, so that the ordinary weight gradients are never computed. Nothing of the model
is changed, and all hooks go when the context ends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from gradmask.containers import check_cuttable
from gradmask.distributed import note_whole_parameters
from gradmask.errors import ModelError
from gradmask.fisher.calls import Call, differentiable, is_batched, square_together, unequal_sums
from gradmask.fisher.explain import explanations
from gradmask.fisher.graph import Node, leaves, lowest, rearranges, structure, walk
from gradmask.fisher.observe import Observer
from gradmask.fisher.reference import zero_squares
from gradmask.fisher.tied import add_tied_squares, is_tied
from gradmask.fisher.verify import Check, Excerpts, excerpt

Strategy = tuple[Any, ...]  # the kinds of the calls that explain a parameter
Strategies = dict[str, Strategy]
OnComplete = Callable[[Iterable[str]], None]


class Capture:
    """Hooks over a model for one batch; a context manager that always removes them.

    Args:
        model: The model, in eval mode.
        parameters: Trainable parameters by name.
        batch_size: Samples in the batch, dimension 0 of every captured input and output.
        allowed: How each name may be captured, as `strategies` of another batch has it (default:
            any).
        refused: Strategies by which names may not be captured.
        listens: Whether the backward pass is somebody else's (`listen`).
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        batch_size: int,
        allowed: Strategies | None = None,
        refused: Iterable[tuple[str, Strategy]] = (),
        *,
        listens: bool = False,
    ) -> None:
        self._parameters, self._listens = parameters, listens
        self._allowed, self._refused = allowed, set(refused)
        self._names = {id(p): name for name, p in parameters.items()}
        self._batch_size = batch_size
        self._calls: list[Call] = []
        self._owner: dict[str, list[Call]] = defaultdict(list)
        self._returned: list[tuple[Any, list[tuple[Call, int]]]] = []
        self._handles: list[Any] = note_whole_parameters(model, self._names)
        self._observer = Observer(model, self._names, batch_size)
        self._norms: dict[tuple[Call, int], Tensor] | None = None
        self._totals: dict[str, Tensor] | None = None
        self._on_complete: OnComplete = lambda _: None
        self._running = False
        self._means: dict[str, Tensor] | None = None
        self._checked: tuple[Check, Excerpts] | None = None
        self.handled: set[str] = set()
        self.reached: set[str] = set()
        self.of_loss: list[nn.Parameter] = []
        self.rearranges = False
        self.structure = 0

    def __enter__(self) -> Capture:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._observer.remove()
        self._calls.clear()
        self._returned.clear()
        self._owner.clear()

    def resolve(
        self, outputs: Any, term: Tensor | None = None, *, all_outputs: bool = False
    ) -> None:
        """Decide which parameters the captured calls explain completely; the rest is not handled.

        A parameter is handled if every path from the loss to it goes through a captured call: this
        finds weights that are also used outside their layer, and by the loss.

        Args:
            outputs: What the model returned.
            term: A scalar of the samples' losses (default: all that the outputs depend on).
            all_outputs: Other terms, of any outputs, will follow.

        Raises:
            ModelError: If the outputs do not depend on the parameters, or hide their graph.
        """
        self._observer.stop()
        tensors = differentiable(outputs)
        roots = list(dict.fromkeys(t.grad_fn for t in tensors))
        if not roots and (term is None or term.grad_fn is None):
            check_cuttable(outputs, "outputs")
            raise ModelError("The model's outputs do not depend on its trainable parameters.")
        order, parents = walk(roots)
        self.structure = structure(order)
        self.rearranges = rearranges(order, self._batch_size)
        if term is not None:
            before = {id(node) for node in order}
            roots = (roots if all_outputs else []) + [term.grad_fn] * (term.grad_fn is not None)
            order, parents = walk(roots)
            variables = (getattr(n, "variable", None) for n in order if id(n) not in before)
            self.of_loss = [v for v in variables if isinstance(v, nn.Parameter)]
        reached = leaves(order, lambda variable: self._names.get(id(variable)))
        self.reached = set(reached)
        if term is not None and self._uses_batch(term, tensors):
            return
        # What the loss does not depend on has gradient zero.
        self.handled = self._parameters.keys() - reached.keys()
        for name, leaf in reached.items():
            explained = explanations(
                (name, self._parameters[name]), leaf, parents, set(roots), self._observer
            )
            for calls in explained:
                if calls and self._permits(name, _strategy(calls)):
                    self._owner[name] = calls
                    self.handled.add(name)
                    for call in calls:
                        call.explains(name, self._parameters[name])
                    break
        self._keep_used_names()
        self._place_hooks(order)

    def _uses_batch(self, term: Tensor, tensors: list[Tensor]) -> bool:
        """Whether a loss uses an output that belongs to no sample, not by way of others."""
        spanning = {t.grad_fn for t in tensors if is_batched(t, self._batch_size)}
        of_batch = {t.grad_fn for t in tensors} - spanning
        stack, seen = [term.grad_fn], {term.grad_fn}
        while stack and of_batch:
            node = stack.pop()
            if node in of_batch:
                return True
            if node is None or node in spanning:
                continue
            fresh = [below for below, _ in node.next_functions if below not in seen]
            seen.update(fresh)
            stack += fresh
        return False

    def strategies(self) -> Strategies:
        """How each captured parameter is measured; its first word is the kind of call."""
        return {name: _strategy(self._owner[name]) for name in self.handled if name in self._owner}

    def sizes(self) -> tuple[Any, ...]:
        """Sizes of what the captured calls returned, those of the samples as shares of a batch."""
        edges = [edge for call in self._calls for edge in call.edges]
        shapes = [tuple(e.node._input_metadata[e.output_nr].shape) for e in edges]
        return tuple((s[0] / self._batch_size, *s[1:]) for s in shapes if s)

    def types(self) -> set[torch.dtype]:
        """Types of what the captured calls returned."""
        edges = [edge for call in self._calls for edge in call.edges]
        return {e.node._input_metadata[e.output_nr].dtype for e in edges}

    def _permits(self, name: str, strategy: Strategy) -> bool:
        allowed = self._allowed is None or self._allowed.get(name) == strategy
        return allowed and (name, strategy) not in self._refused

    def _keep_used_names(self) -> None:
        """Forget calls, and names of calls, that explain nothing."""
        self._calls = list(dict.fromkeys(c for calls in self._owner.values() for c in calls))
        for call in self._calls:
            call.names = {
                local: name for local, name in call.names.items() if call in self._owner[name]
            }
        self._observer.layers.clear()
        self._observer.modules.clear()

    def _place_hooks(self, order: list[Node]) -> None:
        """The lowest gradients are what autograd returns; a hook reads each of the others.

        Both come after any hook of the user on the same tensor, as the weight gradients do.
        """
        wanted: dict[Any, list[tuple[Call, int]]] = defaultdict(list)
        edges: dict[Any, Any] = {}
        for call in self._calls:
            for index, edge in enumerate(call.edges):
                wanted[edge.node, edge.output_nr].append((call, index))
                edges[edge.node, edge.output_nr] = edge
        # The lowest nodes run only if more is asked for, as training does.
        returned = set() if self._listens else lowest(order, {node for node, _ in wanted})
        for (node, output), calls in wanted.items():
            if node in returned:
                self._returned.append((edges[node, output], calls))
            else:
                self._handles.append(node.register_prehook(partial(self._read, output, calls)))

    def _read(
        self, output: int, calls: list[tuple[Call, int]], gradients: tuple[Tensor | None, ...]
    ) -> None:
        if self._running:  # and not in a pass of a `DerivedCall`
            with torch.no_grad():
                self._receive(calls, gradients[output])

    def _receive(self, calls: list[tuple[Call, int]], g: Tensor | None) -> None:
        if g is None:
            return
        for call, index in calls:
            if self._norms is not None:
                rows = call.rows(g).reshape(self._batch_size, -1)
                rows = rows.abs() if rows.is_complex() else rows
                self._norms[call, index] = rows.double().norm(dim=1)
                continue
            call.gradients[index] = g.detach()
            # Squared at once, so that the gradient need not be kept.
            if self._is_alone(call) and self._adds(call):
                self._excerpt(call.names.values(), call.add_squares)
                call.gradients[index] = None
                self._on_complete(call.names.values())
                if self._listens:
                    call.release()
            elif self._listens:
                call.keep()

    def _is_alone(self, call: Call) -> bool:
        """Whether no other call has its parameters, and its gradients come all at once."""
        names = call.names.values()
        return len(call.edges) == 1 and all(self._owner[name] == [call] for name in names)

    def _adds(self, call: Call) -> bool:
        if self._totals is None:
            return False
        if self._means is None or not call.adds_moments:
            return call.add_squares(self._totals)
        call.add_moments(self._totals, self._means)
        return True

    def _excerpt(
        self, names: Iterable[str], add: Callable[[dict[str, Tensor], slice], Any]
    ) -> None:
        """Keep an excerpt of the squares of the checked samples alone, added up in the same way."""
        if self._checked is not None:
            (rows, turn), excerpts = self._checked
            squares = {name: zero_squares(self._parameters[name]) for name in names}
            add(squares, rows)
            for name, value in squares.items():
                excerpts[name] += excerpt(value, turn)

    def _backward(self, term: Tensor) -> None:
        if not self._returned:
            return
        # Only layer outputs are asked for: weight gradients are never formed, unless their means
        # are wanted and the layers cannot add them up.
        edges: list[Any] = [edge for edge, _ in self._returned]
        names = self._summed_by_autograd()
        weights = [self._parameters[name] for name in names]
        self._running = True
        try:
            gradients = torch.autograd.grad(
                term, edges + weights, retain_graph=True, allow_unused=True
            )
        finally:
            self._running = False
        with torch.no_grad():
            for (_, calls), g in zip(self._returned, gradients[: len(edges)], strict=True):
                self._receive(calls, g)
            for name, g in zip(names, gradients[len(edges) :], strict=True):
                if g is not None:
                    self._means[name] += g.to_dense()  # type: ignore[index]

    def _summed_by_autograd(self) -> list[str]:
        """Handled names whose mean gradients are wanted, and that no call adds up itself."""
        if self._means is None:
            return []
        calls = (call for call in self._calls if call.adds_moments and self._is_alone(call))
        by_calls = {name for call in calls for name in call.names.values()}
        return [name for name in self._means if name in self.handled - by_calls]

    def mixed(self, outputs: Any) -> set[str]:
        """Find parameters whose calls mix samples, or do not have them where they should be.

        Every sample's outputs are multiplied by a power of two: the rows of its gradients must grow
        by just that, which is exact in any precision.

        Args:
            outputs: What the model returned.

        Returns:
            Names of the parameters.
        """
        tensors = [t for t in differentiable(outputs) if is_batched(t, self._batch_size)]
        if not tensors:
            return set()
        generator = torch.Generator().manual_seed(0)
        exponents = torch.randperm(self._batch_size, generator=generator, device="cpu") % 16
        weights = torch.ones(self._batch_size, dtype=torch.float64, device="cpu").ldexp(
            exponents - 8
        )
        found = []
        for scales in (torch.ones_like(weights), weights):
            self._norms = {}
            terms = [t @ scales.to(t) for t in map(unequal_sums, tensors)]
            self._backward(torch.stack(terms).sum())
            found.append(self._norms)
        self._norms = None
        plain, weighted = found
        near = 1e-10 if all(t.dtype.to_real() == torch.float64 for t in tensors) else 1e-4
        return {
            name
            for key, norms in weighted.items()
            for name in key[0].names.values()
            if not torch.allclose(norms, plain[key] * weights.to(norms.device), rtol=near, atol=0)
        }

    def drop(self, names: set[str]) -> None:
        """Leave parameters to be measured in some other way."""
        self.handled -= names
        for name in names:
            self._owner.pop(name, None)
        self._keep_used_names()

    def add_squares(
        self,
        terms: Iterable[Tensor],
        totals: dict[str, Tensor],
        on_complete: OnComplete = lambda _: None,
        check: Check | None = None,
        means: dict[str, Tensor] | None = None,
    ) -> Excerpts:
        """Add, over samples and terms, the squared per-sample gradients of each handled name.

        Args:
            terms: Scalars, each a sum over the samples of that sample's own value.
            totals: `{name: tensor of the parameter's shape}`, changed in place.
            on_complete: Told the names of totals that a term adds nothing more to, in an order that
                depends on the model alone.
            check: What to check.
            means: Sums of the gradients themselves, changed in place; None if not wanted.

        Returns:
            Excerpts of the squares of the samples to check, of every handled name.
        """
        self._totals, self._on_complete = totals, on_complete
        excerpts: Excerpts = {}
        if check is not None:
            for name in self.handled:
                excerpts[name] = excerpt(self._parameters[name].detach(), check.turn).abs().mul_(0)
            self._checked = check, excerpts
        self._means = means
        for term in terms:
            self._backward(term)
            with torch.no_grad():
                self.square_rest(totals)
        self._checked = self._means = None
        return excerpts

    def listen(self, totals: dict[str, Tensor], on_complete: OnComplete = lambda _: None) -> None:
        """Add the squares of the next backward pass, whoever runs it, to totals.

        Args:
            totals: `{name: tensor of the parameter's shape}`, changed in place; complete after
                `square_rest`.
            on_complete: As of `add_squares`.
        """
        self._observer.remove()  # the forward pass is over
        self._totals, self._on_complete, self._running = totals, on_complete, True

    def gradients(self, term: Tensor) -> list[list[Call]]:
        """Run the backward pass of a term; the calls keep their gradients until the next one.

        Args:
            term: Scalar, a sum over the samples of that sample's own value.

        Returns:
            Groups of calls for `per_sample_together`; a parameter is in one group only.
        """
        self._totals = None
        for call in self._calls:
            call.gradients = [None] * len(call.edges)
        self._backward(term)
        return self._groups()

    def _groups(self) -> list[list[Call]]:
        """Calls that hold gradients; those that share parameters are together."""
        waiting = [call for call in self._calls if any(g is not None for g in call.gradients)]
        groups: dict[str, list[Call]] = {}
        for call in waiting:
            near = {id(groups[n]): groups[n] for n in call.names.values() if n in groups}
            group = [c for others in near.values() for c in others] + [call]
            groups |= dict.fromkeys((n for c in group for n in c.names.values()), group)
        return list({id(group): group for group in groups.values()}.values())

    def square_rest(self, totals: dict[str, Tensor]) -> None:
        """What could not be squared at once."""
        for group in self._groups():
            names = dict.fromkeys(n for call in group for n in call.names.values())
            together = (
                partial(add_tied_squares, group)
                if is_tied(group)
                else partial(square_together, group, n=self._batch_size)
            )
            together(totals)
            self._excerpt(names, lambda squares, rows: together(squares, samples=rows))  # noqa: B023
            self._on_complete(names)
            for call in group:
                call.gradients = [None] * len(call.edges)


def _strategy(calls: list[Call]) -> Strategy:
    return tuple(sorted((call.kind for call in calls), key=repr))
