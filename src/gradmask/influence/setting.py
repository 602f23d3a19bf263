"""What is measured, checked, with the sizes of blocks that fit in memory."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradmask.containers import part
from gradmask.errors import DataError, OptionError
from gradmask.fisher.likelihood import Loss, draw_directions
from gradmask.fisher.losses import nll
from gradmask.fisher.reference import call
from gradmask.influence.distribution import Head
from gradmask.influence.guard import Parameters, Rows
from gradmask.influence.samples import (
    Block,
    Samples,
    captured,
    condensed,
)

logger = logging.getLogger("gradmask")

# Values of some sources (first slice) on some probe samples (second slice).
Blocks = Generator[tuple[slice, slice, Tensor], None, None]

# On a CPU more gradients and activations at a time are slower: they leave the cache.
PASS_BYTES_CPU = 1 << 27
PRODUCT_BYTES_CPU = 1 << 24


@dataclass(frozen=True)
class Setting:
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
    def together(self) -> int:
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
        for rows in samples.blocks(self.together):
            n = rows.stop - rows.start
            with captured(self.model, samples, rows) as batch:
                groups = batch.gradients(LossTerm(samples, rows))
            graph = 2 * n * self.activation
            with torch.no_grad():
                groups, size = condensed(groups, self.parameters, n, graph)
            if block and used + size > share:
                yield slice(start, rows.start), block
                start, used, block = rows.start, 0, []
            block.append((slice(rows.start - start, rows.stop - start), groups))
            used += size
        yield slice(start, samples.count), block

    def pair_blocks(self, together: bool) -> tuple[int, int]:
        """Sources whose gradients are held, and probe samples that run with each of them.

        Args:
            together: Whether all these sources run at the same time.
        """
        gradient = sum(p.nbytes for p in self.parameters.values())
        share = self.memory // 4
        sources = min(self.sources.count, max(1, share // (gradient + 2 * self.activation)))
        passes = sources if together else 1
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
        self._targets, self._loss = part(samples.targets, which), samples.loss
        self.empty: frozenset[int] = frozenset()

    def __call__(self, outputs: Any, rows: Rows, alone: bool = False) -> Tensor:
        """The sum over some of its samples."""
        total, empty = nll(outputs, part(self._targets, rows), self._loss, alone=alone)
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


def check_losses(setting: Setting) -> None:
    """Run the sources forward, so that a loss that is not finite is told before long work."""
    with torch.no_grad():
        for rows in setting.sources.blocks(setting.together):
            outputs = call(setting.model, part(setting.sources.inputs, rows))
            LossTerm(setting.sources, rows)(outputs, slice(None))


def drawn_directions(setting: Setting, seed: int) -> Tensor:
    """Random directions in the logits of the probe samples, for `directional`."""
    head, generator = setting.head, torch.Generator().manual_seed(seed)
    assert head is not None
    assert isinstance(setting.loss, str)
    drawn = []
    with torch.no_grad():
        for columns in setting.probe.blocks(setting.together):
            outputs = call(setting.model, part(setting.probe.inputs, columns))
            blank = head.blank_targets(check_outputs(outputs))
            drawn.append(draw_directions(outputs, blank, setting.loss, generator))
    return torch.cat(drawn)


def check_outputs(outputs: Tensor) -> Tensor:
    """Outputs of probe samples, or a DataError if they contain NaN."""
    if outputs.isnan().any():
        raise DataError(
            "The model's outputs for the probe samples contain NaN: check the inputs for NaN or "
            "infinity, and that training has not diverged (a lower learning rate)."
        )
    return outputs
