"""What is measured, checked, with the sizes of blocks that fit in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradmask.containers import map_tensors, part, sample_count
from gradmask.errors import DataError, ModelError, OptionError
from gradmask.fisher.adapter import Adapter, Unpack
from gradmask.fisher.calls import Unmeasurable
from gradmask.fisher.likelihood import Loss, draw_directions
from gradmask.fisher.losses import nll
from gradmask.fisher.probe import safe_strategies
from gradmask.fisher.reference import UNFIT, check_independent, check_repeatable
from gradmask.fisher.scored import call, has_names
from gradmask.fisher.verify import Verify, computed_in
from gradmask.influence.distribution import Head, check_layouts, find_head
from gradmask.influence.guard import Guard, Parameters, Refuted, Rows
from gradmask.influence.samples import Block, Samples, activation_bytes, captured, without_graph

logger = logging.getLogger("gradmask")

# Values of some sources (first slice) on some probe samples (second slice).
Blocks = Generator[tuple[slice, slice, Tensor], None, None]

# On a CPU more gradients and activations at a time are slower: they leave the cache.
PASS_BYTES_CPU = 1 << 27
PRODUCT_BYTES_CPU = 1 << 24


@dataclass(frozen=True)
class Problem:
    """A model in eval mode, sources and a probe set.

    Attributes:
        model: The model.
        parameters: Its trainable parameters.
        loss: The negative log-likelihood.
        head: How outputs are distributions; None for a callable loss.
        sources: Samples with targets.
        probe: Samples, with targets if gradients at given labels are wanted.
        memory: Bytes for what is held at a time.
        activation: Bytes that the backward pass of one sample keeps.
        example: Outputs for the first probe sample.
    """

    model: nn.Module
    parameters: Parameters
    loss: Loss
    head: Head | None
    sources: Samples
    probe: Samples
    memory: int
    activation: int
    example: Any

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(iter(self.parameters.values())).device

    @property
    def batch_size(self) -> int:
        """Samples that run forward and backward at a time."""
        share = self.memory // 8
        if self.device.type == "cpu":
            share = min(share, PASS_BYTES_CPU)
        return max(1, share // (2 * self.activation))

    def gradients(self, samples: Samples, share: int) -> Iterator[tuple[slice, Block]]:
        """Per-sample gradients of samples with targets, as many at a time as fit.

        Args:
            samples: The samples.
            share: Bytes they may take.

        Yields:
            Which samples, and what their gradients follow from.
        """
        start, used = 0, 0
        block: Block = []
        for rows in samples.blocks(self.batch_size):
            n = rows.stop - rows.start
            with captured(self.model, samples, rows) as batch:
                groups = batch.gradients(LossTerm(samples, rows))
            graph = 2 * n * self.activation
            with torch.no_grad():
                groups, size = without_graph(groups, self.parameters, n, graph)
            if block and used + size > share:
                yield slice(start, rows.start), block
                start, used, block = rows.start, 0, []
            block.append((slice(rows.start - start, rows.stop - start), groups))
            used += size
        yield slice(start, samples.count), block

    def pair_blocks(self, batched: bool) -> tuple[int, int]:
        """Sources whose gradients are held, and probe samples that run with each of them.

        Args:
            batched: Whether all these sources run at the same time.
        """
        gradient = sum(p.nbytes for p in self.parameters.values())
        share = self.memory // 4
        sources = min(self.sources.count, max(1, share // (gradient + 2 * self.activation)))
        passes = sources if batched else 1
        if self.device.type == "cpu":
            share = min(share, PASS_BYTES_CPU)
        return sources, min(self.probe.count, max(1, share // (passes * self.activation)))

    @property
    def labels(self) -> int:
        """Labels that a probe sample can have, counted over its positions."""
        assert self.head is not None
        positions, classes = self.head.logits(self.example).shape[1:]
        return positions if self.loss in ("bernoulli", "mse") else positions * classes

    def blank_targets(self) -> Tensor:
        """Targets of the probe samples that only have the right form."""
        assert self.head is not None
        blank = self.head.blank_targets(self.example)
        return blank.expand(self.probe.count, *blank.shape[1:])

    def elements(self) -> int:
        """Elements of per-sample gradients that may be held at a time, of each of two batches."""
        size = max(p.element_size() for p in self.parameters.values())
        share = self.memory // 16
        if self.device.type == "cpu":
            share = min(share, PRODUCT_BYTES_CPU)
        return max(1, share // size)


class LossTerm:
    """The loss of a block of samples with targets, for its per-sample gradients."""

    def __init__(self, samples: Samples, which: slice) -> None:
        self._targets, self.loss = part(samples.targets, which), samples.loss
        self.empty: frozenset[int] = frozenset()

    def __call__(self, outputs: Any, rows: Rows, alone: bool = False) -> Tensor:
        """The sum over some of its samples."""
        total, empty = nll(outputs, part(self._targets, rows), self.loss, alone=alone)
        if rows == slice(None):
            self.empty = empty
        return total


def precision(parameters: Parameters) -> torch.dtype:
    """The precision of results: the parameters', but float32 for half-precision ones."""
    double = any(p.dtype.to_real() == torch.float64 for p in parameters.values())
    return torch.float64 if double else torch.float32


def check_memory(memory: int) -> None:
    """Raise an OptionError unless there is memory to work in."""
    if memory < 1:
        raise OptionError(f"memory={memory!r} must be positive: bytes, for example 2**30.")


def check_losses(problem: Problem) -> None:
    """Run the sources forward, so that a loss that is not finite is told before long work."""
    with torch.no_grad():
        for rows in problem.sources.blocks(problem.batch_size):
            outputs = call(problem.model, part(problem.sources.inputs, rows))
            LossTerm(problem.sources, rows)(outputs, slice(None))


def drawn_directions(problem: Problem, seed: int) -> Tensor:
    """Random directions in the logits of the probe samples, for `directional`."""
    head, generator = problem.head, torch.Generator().manual_seed(seed)
    assert head is not None
    assert isinstance(problem.loss, str)
    drawn = []
    with torch.no_grad():
        for columns in problem.probe.blocks(problem.batch_size):
            outputs = call(problem.model, part(problem.probe.inputs, columns))
            blank = head.blank_targets(check_outputs(outputs))
            drawn.append(draw_directions(outputs, blank, problem.loss, generator))
    return torch.cat(drawn)


def check_outputs(outputs: Tensor) -> Tensor:
    """Outputs of probe samples, or a DataError if they contain NaN."""
    if outputs.isnan().any():
        raise DataError(
            "The model's outputs for the probe samples contain NaN: check the inputs for NaN or "
            "infinity, and that training has not diverged (a lower learning rate)."
        )
    return outputs


def prepare(
    model: nn.Module,
    parameters: Parameters,
    sources: Any,
    probe: Any,
    *,
    labelled: bool,
    loss: Loss | None,
    unpack: Unpack | None,
    memory: int,
    alone: bool,
    verify: Verify,
) -> Problem:
    """Check the data and find out what the model needs.

    Args:
        model: The model, in eval mode.
        parameters: Its trainable parameters.
        sources: `(inputs, targets)`, or a mapping with its targets among it.
        probe: Inputs; if `labelled`, as the sources.
        labelled: Whether the probe has targets.
        loss: The negative log-likelihood; None for what the sources say.
        unpack: From sources of another form to `(inputs, targets)`.
        memory: Bytes.
        alone: Whether all is measured with the whole model, one sample at a time.
        verify: How gradients are checked.

    Raises:
        DataError: If data are empty or of a wrong form, or labels out of range.
    """
    adapter = Adapter(model, loss, unpack)
    inputs, targets = _labelled("sources", sources, adapter)
    probe_inputs, probe_targets = (
        _labelled("probe", probe, adapter) if labelled else (_unlabelled(probe, adapter), None)
    )
    model, loss = adapter.model, adapter.loss
    try:
        first, activation = activation_bytes(model, inputs)
    except UNFIT as error:
        _refuse_if_two_work(model, inputs, error)
        raise
    try:
        example, other = activation_bytes(model, probe_inputs)
    except TypeError as error:
        if labelled or not isinstance(probe, tuple | list):
            raise
        raise DataError(
            f"The model does not take the {len(probe)} parts of the probe as its inputs ({error}): "
            "give inputs alone, or (inputs, targets) with fisher='empirical'."
        ) from error
    head = None
    if isinstance(loss, str):
        head = find_head(first, targets[:1], targets, loss)
        if probe_targets is not None:
            find_head(example, probe_targets[:1], probe_targets, loss)
        check_layouts(loss, first, example)

    def samples(data: Any, labels: Tensor | None, count: int) -> Samples:
        guard = Guard(parameters, alone, verify)
        strategies = safe_strategies(model, data, guard.fast) if count > 1 else None
        return Samples(data, labels, count, loss, guard, strategies)

    problem = Problem(
        model,
        parameters,
        loss,
        head,
        samples(inputs, targets, len(targets)),
        samples(probe_inputs, probe_targets, sample_count(probe_inputs)),
        memory,
        max(activation, other),
        map_tensors(lambda t: t.detach(), example),
    )
    if verify:
        lowest = computed_in(parameters.values())
        check_repeatable(model, inputs, 0, lowest)
        for data in (problem.sources, problem.probe):
            rows = next(data.blocks(problem.batch_size))
            last = rows.stop - 1
            some = range(rows.stop) if verify == "all" else {last, last // 2, 0} if last else ()
            check_independent(model, part(data.inputs, rows), some, lowest)
    return problem


def guarded(
    measure: Callable[[Problem], Tensor],
    model: nn.Module,
    parameters: Parameters,
    **options: Any,
) -> Tensor:
    """Measure something; again, in a safer way, if the check of single samples fails.

    Args:
        measure: What is measured, of a problem.
        model: The model, in eval mode.
        parameters: Its trainable parameters.
        options: Those of `prepare`.
    """
    try:
        return measure(prepare(model, parameters, alone=False, **options))
    except (Refuted, Unmeasurable):
        return measure(prepare(model, parameters, alone=True, **options))


def _refuse_if_two_work(model: nn.Module, inputs: Any, error: Exception) -> None:
    """Say so if the model takes two samples and not one."""
    try:
        with torch.no_grad():
            call(model, part(inputs, slice(2)))
    except Exception:
        return
    if sample_count(inputs) > 1:
        raise ModelError(
            f"The model does not take one sample alone ({error}), and influence needs that: let "
            "its forward pass accept a batch of one."
        ) from error


def _labelled(name: str, data: Any, adapter: Adapter) -> tuple[Any, Tensor]:
    pair = isinstance(data, tuple | list) and len(data) == 2
    if not (pair or has_names(data) or adapter.unpacks):
        raise DataError(
            f"The {name} are a {type(data).__name__}: expected one pair (inputs, targets); join "
            "the batches of a loader with torch.cat."
        )
    _check_some(name, sample_count(data))
    return adapter(data)


def _unlabelled(data: Any, adapter: Adapter) -> Any:
    _check_some("probe", sample_count(data))
    return adapter.inputs(data)


def _check_some(name: str, count: int) -> None:
    if count == 0:
        raise DataError(f"The {name} set has no samples: give at least one, in dimension 0.")
