"""Per-sample gradients of a batch, kept as what layers need to form them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from gradmask.containers import part
from gradmask.fisher.calls import Call, LayerCall, per_sample_together
from gradmask.fisher.capture import Capture, Strategies
from gradmask.fisher.likelihood import Loss
from gradmask.fisher.losses import check_parameters_of
from gradmask.fisher.scored import call
from gradmask.influence.guard import Groups, Guard, Parameters, Term, WholeCall

# Samples that ran one batch after the other: the groups of each, and which of them they are of.
Block = list[tuple[slice, Groups]]


@dataclass(frozen=True)
class Samples:
    """Inputs, perhaps with targets and their loss, and how their gradients are captured.

    Attributes:
        inputs: Inputs.
        targets: Targets, if gradients are wanted.
        count: How many they are.
        loss: The negative log-likelihood.
        guard: Checks their gradients.
        strategies: What `safe_strategies` gave.
    """

    inputs: Any
    targets: Tensor | None
    count: int
    loss: Loss
    guard: Guard
    strategies: Strategies | None = None

    def blocks(self, size: int) -> Iterator[slice]:
        """Slices of at most `size` samples."""
        return (slice(n, min(n + size, self.count)) for n in range(0, self.count, size))


class FormedCall(Call):
    """Per-sample gradients that have been formed."""

    def __init__(self, gradients: dict[str, Tensor]) -> None:
        super().__init__({name: name for name in gradients}, [])
        self.formed = gradients

    def per_sample(self, samples: slice) -> dict[str, Tensor]:
        """What has been formed."""
        return {name: gradient[samples] for name, gradient in self.formed.items()}


class Batch:
    """The outputs of a batch and, term by term, its per-sample gradients.

    Args:
        model: The model, in eval mode.
        inputs: Inputs of the batch.
        count: Samples in it.
        guard: Checks its gradients.
        capture: What has been captured.
        outputs: The model's outputs, with their graph.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        count: int,
        guard: Guard,
        capture: Capture,
        outputs: Any,
    ) -> None:
        self.outputs = outputs
        self._model, self._inputs, self._count = model, inputs, count
        self._guard, self._capture, self._first = guard, capture, True

    def gradients(self, term: Term) -> Groups:
        """Groups of calls with the gradients of a term, until the next term."""
        capture, parameters = self._capture, self._guard.parameters
        total = term(self.outputs, slice(None))
        if self._first:
            capture.resolve(self.outputs, total, all_outputs=True)
            known = chain(self._model.parameters(), parameters.values())
            check_parameters_of(term.loss, capture.of_loss, known)
            if self._count > 1 and capture.rearranges:
                capture.drop(capture.mixed(self.outputs))
        groups: list[list[Call]] = capture.gradients(total)
        rest = {n: p for n, p in parameters.items() if n not in capture.handled}
        if rest:
            groups.append([WholeCall(self._model, self._inputs, rest, term)])
        named = {frozenset(n for c in group for n in c.names.values()): group for group in groups}
        if self._first:
            whole = WholeCall(self._model, self._inputs, parameters, term)
            self._guard.check(capture, named, whole, self._count)
            self._first = False
        return named


@contextmanager
def captured(model: nn.Module, samples: Samples, rows: slice) -> Iterator[Batch]:
    """Run a batch forward so that its per-sample gradients can be had.

    Args:
        model: The model, in eval mode.
        samples: The samples.
        rows: Which of them are the batch.

    Yields:
        The batch.
    """
    inputs, count = part(samples.inputs, rows), rows.stop - rows.start
    with Capture(model, samples.guard.fast, count, samples.strategies) as capture:
        yield Batch(model, inputs, count, samples.guard, capture, call(model, inputs))


def same_groups(a: Block, b: Block) -> tuple[Block, Block]:
    """The groups of all batches, made one group each where they differ."""
    kinds = {frozenset(groups) for _, groups in (*a, *b)}
    if len(kinds) == 1:
        return a, b
    names = frozenset[str]().union(*(group for groups in kinds for group in groups))

    def merged(groups: Groups) -> Groups:
        return {names: [call for group in groups.values() for call in group]}

    first, second = ([(rows, merged(groups)) for rows, groups in block] for block in (a, b))
    return first, second


def without_graph(
    groups: Groups, parameters: Parameters, samples: int, graph: int
) -> tuple[Groups, int]:
    """Groups without the graph where that is possible, in the form that takes less memory.

    Gradients that are smaller than what they follow from are formed, with the others an input and
    the gradient of an output are kept.

    Args:
        groups: The groups of a batch that will have no other term.
        parameters: The parameters.
        samples: Samples in the batch.
        graph: Bytes of the batch's graph.

    Returns:
        Groups, and the bytes that they take.
    """
    found: Groups = {}
    total = 0
    for names, group in groups.items():
        layers = [call.release_graph() for call in group if isinstance(call, LayerCall)]
        kept = sum(layers) if len(layers) == len(group) else graph
        formed = samples * sum(parameters[name].nbytes for name in names)
        if formed <= kept:
            group = [FormedCall(per_sample_together(group, slice(None)))]
        found[names] = group
        total += min(formed, kept)
    return found, total


def stacked(groups: Groups, parameters: Parameters) -> dict[str, Tensor]:
    """Per-sample gradients `{name: (n, *shape)}` in the parameters' precision."""
    found = {
        name: gradient
        for group in groups.values()
        for name, gradient in per_sample_together(group, slice(None)).items()
    }
    return {name: g.to(parameters[name].dtype) for name, g in found.items()}


def activation_bytes(model: nn.Module, inputs: Any) -> tuple[Any, int]:
    """Outputs of the first sample, and the bytes that its backward pass would keep."""
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor.detach()  # an operation that saved its own result would never be freed

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = call(model, part(inputs, slice(1)))
    return outputs, max(1, sum(sizes.values()))
