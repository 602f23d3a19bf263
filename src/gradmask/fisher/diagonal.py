"""The public function: the Fisher diagonal of a model over data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gradmask.distributed import (
    data_groups,
    place,
    reshard,
    shard_groups,
    sum_over,
    together,
    unwrapped,
)
from gradmask.errors import DataError, check_max_samples
from gradmask.fisher.batch import DOING, Pass, check_batches, unpacked
from gradmask.fisher.likelihood import Loss, check_likelihood
from gradmask.fisher.reference import zero_squares
from gradmask.fisher.sampling import random_samples
from gradmask.fisher.sharded import sharded_sums
from gradmask.parameters import measuring, trainable_parameters
from gradmask.seeding import derive_seed


def fisher_diagonal(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    kind: str = "empirical",
    loss: Loss = "cross_entropy",
    max_samples: int | None = None,
    seed: int = 0,
    group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information: a_jj = (1/n) Σ_i (∂ log f(x_i) / ∂θ_j)².

    Per-sample gradients are squared, THEN averaged over samples (equations 7 and 9 of L. Jiang,
    "Gradient mask and neural network generalization"). The pass runs in eval mode and leaves the
    model, its gradients, modes and running statistics, and the random state of PyTorch unchanged.

    With `DistributedDataParallel` or `fully_shard` every rank gives the samples it has, as many as
    it has, and all get the mean over the samples of all; sharded, each in its own part.

    Args:
        model: Any module that treats its samples (dimension 0) independently in eval mode.
        loader: Iterable of `(inputs, targets)` batches. Inputs are a tensor, or a tuple or dict
            of tensors that become the model's arguments.
        kind: `empirical` (the data's labels), `sampled` (the model's own distribution over
            labels, by one random direction in the logits of each sample) or `exact` (expectation
            over all labels: one backward pass for each class).
        loss: `cross_entropy` (outputs are logits), `bernoulli` (independent binary logits), or a
            callable `(outputs, targets)` that is a negative log-likelihood, with any reduction.
        max_samples: Measure on a seeded random part of the data of this size (default: all), of
            which every rank draws an equal part from what it has.
        seed: Seed of that part and of the random directions.
        group: Ranks that measure together (default: those the model is wrapped for).

    Returns:
        `{parameter name: tensor of the parameter's shape}`, the mean over samples, in the
        parameter's precision (float32 for half-precision parameters). DTensors for sharded
        parameters; names without the `module.` of `DistributedDataParallel`.

    Raises:
        OptionError: If an option is unknown or does not fit the others.
        ModelError: If the model has nothing to train or mixes samples by batch statistics; if it
            is sharded and a layer has no rule.
        DataError: If there are no batches or samples, a label is out of range, or the loss is not
            finite.
        DistributedError: If that happened on another rank.
    """
    check_likelihood(kind, loss)
    check_max_samples(max_samples)
    check_batches(loader)
    groups = data_groups(model, group)
    rank, ranks = place(groups)
    model = unwrapped(model)
    reshard(model)
    parameters = trainable_parameters(model)
    device = next(iter(parameters.values())).device
    seed = derive_seed(seed, "rank", rank) if rank else seed
    batches = loader
    if max_samples is not None:
        share = max_samples // ranks + (rank < max_samples % ranks)
        batches = random_samples(loader, max(1, share), seed)
    single_pass = Pass(model, parameters, kind, loss, torch.Generator().manual_seed(seed))
    with measuring(model, parameters.values()):
        if shard_groups(parameters.values()):
            totals, count = sharded_sums(single_pass, batches, device, groups)
        else:
            with together(groups, DOING):
                totals = {name: zero_squares(p) for name, p in parameters.items()}
                count = 0
                for inputs, targets in unpacked(batches, device):
                    single_pass.add(inputs, targets, totals)
                    count += len(targets)
            totals = {name: sum_over(total, groups) for name, total in totals.items()}
            count = int(sum_over(torch.tensor([count], device="cpu"), groups))
    if count == 0:
        raise DataError("The loader gave no samples: an iterator may be used up already.")
    return {name: total.div_(count) for name, total in totals.items()}
