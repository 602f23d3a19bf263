"""The Fisher pass over parameters in shards (`fully_shard`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradmask.containers import map_tensors
from gradmask.distributed import (
    Groups,
    all_ranks_raise,
    local,
    reshard,
    shard_like,
    sum_over,
    sum_to_shard,
)
from gradmask.errors import DataError
from gradmask.fisher.adapter import Adapter, Batch
from gradmask.fisher.batch import ACTIVITY, Pass
from gradmask.fisher.reference import Squares, zero_squares


class ShardSums(Squares):
    """Sums over the ranks of whole tensors, of which this rank keeps its part.

    A whole tensor exists from when it is first asked for until it is settled, so that there is
    never one of every parameter.

    Args:
        parameters: Sharded parameters by name.

    Attributes:
        parts: This rank's parts.
        weight: Weight of what is settled.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        self.weight = 1.0
        self.parts = {name: zero_squares(local(p)) for name, p in parameters.items()}

    def on_complete(self, names: Iterable[str]) -> None:
        """Add whole tensors over the ranks, and let go of them."""
        for name in names:
            whole = self.pop(name, None)
            if whole is not None:
                self.parts[name] += sum_to_shard(whole.mul_(self.weight), self._parameters[name])


def sharded_sums(
    single_pass: Pass, batches: Iterator[tuple[Any, Tensor, bool]], groups: Groups
) -> tuple[dict[str, Tensor], int]:
    """Add up squared per-sample gradients over the batches of all ranks.

    A batch of one runs as two halves, because with one sample the pass would take other
    strategies than on the other ranks.

    Args:
        single_pass: The pass.
        batches: What `in_step` gave.
        groups: The ranks.

    Returns:
        Sums as DTensors, and the number of samples, over all ranks.
    """
    totals = ShardSums(single_pass.parameters)
    count = 0
    try:
        for inputs, targets, own in batches:
            samples = len(targets) if own else 0
            totals.weight = float(own)
            if len(targets) == 1:
                totals.weight /= 2  # exact, as is the sum of two equal numbers
                inputs, targets = map_tensors(_twice, (inputs, targets))
            single_pass.add(inputs, targets, totals, groups, totals.on_complete)
            count += samples
    finally:
        reshard(single_pass.model)
    parameters = single_pass.parameters
    sums = {name: shard_like(part, parameters[name]) for name, part in totals.parts.items()}
    return sums, int(sum_over(torch.tensor([count], device="cpu"), groups))


def _twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor] * 2) if tensor.dim() else tensor


def in_step(
    adapter: Adapter, remaining: Iterator[Batch], groups: Groups
) -> Iterator[tuple[Any, Tensor, bool]]:
    """Read the batches of all ranks, as many on each.

    A layer is gathered for all ranks at once, so all must run it equally often: a rank that has no
    batch left repeats its last one.

    Args:
        adapter: Scores them.
        remaining: Batches of this rank.
        groups: The ranks.

    Yields:
        Inputs and targets, and whether they are this rank's own and not a repetition.
    """
    last: Batch | None = None
    while True:
        with all_ranks_raise(groups, ACTIVITY):
            batch = next(remaining, None)
        if not sum_over(torch.tensor([batch is not None], dtype=torch.int32, device="cpu"), groups):
            return
        last = batch or last
        with all_ranks_raise(groups, ACTIVITY):
            if last is None:
                raise DataError("This rank has no samples: with fully_shard every rank needs some.")
        with all_ranks_raise(groups, ACTIVITY):  # runs the model on all
            inputs, targets = adapter.score(last)
        yield inputs, targets, batch is not None
