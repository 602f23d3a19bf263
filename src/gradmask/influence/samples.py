"""Per-sample gradients of a batch, kept as what layers need to form them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradmask.fisher.calls import Call, LayerCall, full_precision, per_sample_together
from gradmask.fisher.capture import Capture, Ways
from gradmask.fisher.likelihood import Loss, part
from gradmask.fisher.reference import call

Parameters = dict[str, nn.Parameter]
# The scalar whose per-sample gradients are wanted, from the outputs of the samples in the slice.
Term = Callable[[Any, slice], Tensor]
# Calls that together explain some parameters, by the names of these.
Groups = dict[frozenset[str], list[Call]]
# Samples that ran one batch after the other: the groups of each, and which of them they are of.
Block = list[tuple[slice, Groups]]


@dataclass(frozen=True)
class Samples:
    """Inputs, perhaps with targets and their loss, and how their gradients are captured."""

    inputs: Any
    targets: Tensor | None
    count: int
    loss: Loss
    ways: Ways | None = None

    def blocks(self, size: int) -> Iterator[slice]:
        """Slices of at most `size` samples."""
        return (slice(n, min(n + size, self.count)) for n in range(0, self.count, size))


class WholeCall(Call):
    """Parameters that no layer explains: the whole model runs again, one sample at a time."""

    def __init__(self, model: nn.Module, inputs: Any, parameters: Parameters, term: Term) -> None:
        super().__init__({name: name for name in parameters}, [])
        self.model, self.given, self.parameters, self.term = model, inputs, parameters, term

    def per_sample(self, samples: slice) -> dict[str, Tensor]:
        """By single-sample autograd."""
        n = next(t for t in _tensors(self.given)).shape[0]
        rows = []
        for i in range(*samples.indices(n)):
            one = slice(i, i + 1)
            with torch.enable_grad():
                value = self.term(call(self.model, part(self.given, one)), one)
            wanted = list(self.parameters.values())
            gradients = torch.autograd.grad(value, wanted, allow_unused=True)
            rows.append(
                [
                    torch.zeros_like(p) if g is None else g.to_dense()
                    for p, g in zip(wanted, gradients, strict=True)
                ]
            )
        columns = zip(*rows, strict=True)
        return {
            name: full_precision(torch.stack(column))
            for name, column in zip(self.parameters, columns, strict=True)
        }


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
        parameters: The parameters to differentiate by.
        capture: What has been captured.
        outputs: The model's outputs, with their graph.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        parameters: Parameters,
        capture: Capture,
        outputs: Any,
    ) -> None:
        self.outputs = outputs
        self._model, self._inputs, self._capture = model, inputs, capture
        self._rest = {n: p for n, p in parameters.items() if n not in capture.handled}

    def gradients(self, term: Term) -> Groups:
        """Groups of calls with the gradients of a term, until the next term."""
        groups: list[list[Call]] = self._capture.gradients(term(self.outputs, slice(None)))
        if self._rest:
            groups.append([WholeCall(self._model, self._inputs, self._rest, term)])
        return {frozenset(n for c in group for n in c.names.values()): group for group in groups}


@contextmanager
def captured(
    model: nn.Module, inputs: Any, count: int, parameters: Parameters, ways: Ways | None
) -> Iterator[Batch]:
    """Run a batch forward so that its per-sample gradients can be had.

    Args:
        model: The model, in eval mode.
        inputs: Inputs of the batch.
        count: Samples in it.
        parameters: The parameters to differentiate by.
        ways: What `safe_ways` gave.

    Yields:
        The batch.
    """
    with Capture(model, parameters, count, ways) as capture:
        outputs = call(model, inputs)
        capture.resolve(outputs)
        if count > 1 and capture.selects:
            capture.drop(capture.mixed(outputs))
        yield Batch(model, inputs, parameters, capture, outputs)


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


def condensed(
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
        layers = [call.let_go() for call in group if isinstance(call, LayerCall)]
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
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = call(model, part(inputs, slice(1)))
    return outputs, max(1, sum(sizes.values()))


def _tensors(inputs: Any) -> Iterator[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(inputs)
    return (t for t in leaves if isinstance(t, Tensor) and t.dim())
