"""The public functions: the Fisher diagonal of a model over data, and the mean gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gradmask.distributed import (
    all_ranks_raise,
    data_groups,
    rank_and_world_size,
    reshard,
    shard_groups,
    sum_over,
    unwrapped,
)
from gradmask.errors import DataError, ModelError, check_max_samples
from gradmask.fisher.adapter import Adapter, Unpack, check_batches, check_unpack, started
from gradmask.fisher.batch import ACTIVITY, Pass
from gradmask.fisher.likelihood import Loss, check_likelihood
from gradmask.fisher.losses import standard_loss
from gradmask.fisher.reference import zero_squares
from gradmask.fisher.sampling import random_samples
from gradmask.fisher.sharded import in_step, sharded_sums
from gradmask.fisher.verify import Verify, check_verify
from gradmask.loaders import undisturbed
from gradmask.measuring import measuring
from gradmask.parameters import trainable_parameters
from gradmask.seeding import derive_seed

Sums = tuple[dict[str, Tensor], int]


class Moments(NamedTuple):
    """Moments of the gradients of single samples, by parameter name.

    Attributes:
        mean: E[g].
        square: E[g²], the diagonal of the empirical Fisher information.
    """

    mean: dict[str, Tensor]
    square: dict[str, Tensor]


def fisher_diagonal(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    kind: str = "empirical",
    loss: Loss | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    verify: Verify = "spread",
    group: ProcessGroup | None = None,
    unused: set[str] | None = None,
    unpack: Unpack | None = None,
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information: a_jj = (1/n) Σ_i |∂ log f(x_i) / ∂θ_j|².

    Per-sample gradients are squared, THEN averaged over samples (equations 7 and 9 of L. Jiang,
    "Gradient mask and neural network generalization"). The pass runs in eval mode and leaves the
    model, its gradients, modes and running statistics, and random states unchanged, and those of a
    `DataLoader` with its samplers and kept workers: it may be read in the middle of an epoch.

    The pass checks itself: what some samples gave in their batch is compared with what plain
    autograd gives for each of them alone. Where the two differ, all parameters are measured one
    sample at a time, from the start of the data.

    With `DistributedDataParallel` or `fully_shard` every rank gives the samples it has, as many as
    it has, and all get the mean over the samples of all; sharded, each in its own part.

    Args:
        model: Any module that treats its samples (dimension 0) independently in eval mode.
        loader: Iterable of `(inputs, targets)` batches, whose inputs are a tensor, or a tuple or
            dict of tensors that become the model's arguments; or of mappings of arguments with
            the targets among them, as `labels`, `label`, `targets` or `target`.
        kind: `empirical` (the data's labels), `sampled` (the model's own distribution over
            labels, by one random direction in the logits of each sample) or `exact` (expectation
            over all labels: one backward pass for each class).
        loss: `cross_entropy` (outputs are logits), `bernoulli` (independent binary logits), `mse`
            (outputs are the means of a Gaussian of unit variance), or a callable `(outputs,
            targets)` that is a negative log-likelihood, with any reduction. The trainable
            parameters of a module are measured as well, as `loss.<name>`. Default: `cross_entropy`,
            or with batches that are mappings the one whose mean is the model's own loss. Names
            score the `logits` of outputs that have them.
        max_samples: Measure on a seeded random part of the data of this size (default: all), of
            which every rank draws an equal part from what it has.
        seed: Seed of that part and of the random directions.
        verify: What is checked: `spread` (some samples, at growing intervals), `all`, or False.
        group: Ranks that measure together (default: those the model is wrapped for).
        unused: A set to which the names are added on which no sample's loss depends (auxiliary
            heads, parts that only training uses). Their information is 0.
        unpack: From a batch of another form to one of these.

    Returns:
        `{parameter name: tensor of the parameter's shape}`, the mean over samples, real, in the
        parameter's precision (float32 for half-precision parameters). DTensors for sharded
        parameters; names without the `module.` of `DistributedDataParallel`.

    Raises:
        OptionError: If an option is unknown or does not fit the others.
        ModelError: If the model has nothing to train or mixes samples by batch statistics; if it
            is sharded and a layer has no rule.
        DataError: If there are no batches or samples, a label is out of range, the loss is not
            finite or not a function of single samples, or a check fails when the data have been
            read in part and can be read only once.
        DistributedError: If that happened on another rank.
    """
    options: dict[str, Any] = {"kind": kind, "loss": loss, "max_samples": max_samples}
    options |= {"seed": seed, "verify": verify, "group": group, "unpack": unpack}
    return _measure(model, loader, unused=unused, **options).square


def gradient_moments(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    loss: Loss | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    verify: Verify = "spread",
    group: ProcessGroup | None = None,
    unused: set[str] | None = None,
    unpack: Unpack | None = None,
) -> Moments:
    """Mean and mean square of the per-sample gradients, at the data's labels, in one pass.

    E[g]_j = (1/n) Σ_i ∂ −log f(x_i) / ∂θ_j, and E[g²]_j, which is `fisher_diagonal`'s. The mean
    takes the weight gradients of a usual backward pass, which the Fisher diagonal alone does not.

    Args:
        model: As of `fisher_diagonal`, as are all others.
        loader: Iterable of batches.
        loss: Negative log-likelihood.
        max_samples: Measure on a seeded random part of this size.
        seed: Seed of that part.
        verify: What is checked.
        group: Ranks that measure together.
        unused: A set to which the names are added on which no sample's loss depends.
        unpack: From a batch of another form to `(inputs, targets)`.

    Returns:
        Both, `{parameter name: tensor of the parameter's shape}`, means over samples.

    Raises:
        ModelError: Also if the parameters are sharded.
        OptionError: As `fisher_diagonal` does.
        DataError: As `fisher_diagonal` does.
        DistributedError: As `fisher_diagonal` does.
    """
    options: dict[str, Any] = {"kind": "empirical", "loss": loss, "max_samples": max_samples}
    options |= {"seed": seed, "verify": verify, "group": group, "unpack": unpack}
    return _measure(model, loader, mean=True, unused=unused, **options)


def _measure(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    kind: str,
    loss: Loss | None,
    max_samples: int | None,
    seed: int,
    verify: Verify,
    group: ProcessGroup | None,
    unused: set[str] | None,
    unpack: Unpack | None,
    mean: bool = False,
) -> Moments:
    check_likelihood(kind, loss := standard_loss(loss))
    check_unpack(unpack)
    check_max_samples(max_samples)
    check_verify(verify)
    check_batches(loader)
    groups = data_groups(model, group)
    rank, ranks = rank_and_world_size(groups)
    model = unwrapped(model)
    reshard(model)
    parameters = trainable_parameters(model, loss)
    if mean and shard_groups(parameters.values()):
        raise ModelError(
            "The parameters are sharded, and mean gradients are not measured in shards: take a "
            "score of the Fisher information or the weights, or measure the whole model."
        )
    adapter = Adapter(model, loss, unpack)
    seed = derive_seed(seed, "rank", rank) if rank else seed

    def chosen(data: Iterable[Any]) -> Iterable[Any]:
        if max_samples is None:
            return data
        share = max_samples // ranks + (rank < max_samples % ranks)
        return random_samples(data, max(1, share), seed)

    def begin() -> Pass:
        generator = torch.Generator().manual_seed(seed)
        return Pass(adapter.model, parameters, kind, adapter.loss, generator, verify, mean=mean)

    with undisturbed(loader) as data, measuring(model, parameters.values(), loss):
        if shard_groups(parameters.values()):
            parsed = adapter.parse_all(chosen(data))
            batches = started(in_step(adapter, parsed, groups))
            single_pass = begin()
            totals, count = sharded_sums(single_pass, batches, groups)
            means: dict[str, Tensor] = {}
        else:
            with all_ranks_raise(groups, ACTIVITY):
                read = lambda: adapter.read(chosen(data))  # noqa: E731
                batches = started(read())
                single_pass = begin()
                again = None if isinstance(loader, Iterator) else read
                totals, count = _sums(single_pass, batches, again)
            totals, means = (
                {name: sum_over(total, groups) for name, total in sums.items()}
                for sums in (totals, single_pass.means or {})
            )
            count = int(sum_over(torch.tensor([count], device="cpu"), groups))
    if count == 0:
        raise DataError("The loader gave no samples: an iterator may be used up already.")
    if unused is not None:
        unused |= parameters.keys() - _of_any_rank(single_pass.reached, list(parameters), groups)
    means, totals = (
        {name: total.div_(count) for name, total in sums.items()} for sums in (means, totals)
    )
    return Moments(means, totals)


def _sums(
    single_pass: Pass,
    batches: Iterator[tuple[Any, Tensor]],
    again: Callable[[], Iterator[tuple[Any, Tensor]]] | None,
) -> Sums:
    """Squared per-sample gradients added up over the data, from the start again if a check fails.

    Args:
        single_pass: The pass.
        batches: The data.
        again: Reads them from the start; None if they can be read only once.
    """
    kept, before = None, 0
    while True:
        if kept is not None:
            batches, kept = chain([kept], batches), None
        totals = {name: zero_squares(p) for name, p in single_pass.parameters.items()}
        count = 0
        for inputs, targets in batches:
            if single_pass.add(inputs, targets, totals):
                count += len(targets)
                continue
            if count == 0:  # nothing has been lost
                kept = inputs, targets
            elif again is None:
                raise _read_once(count)
            else:
                batches, before = again(), max(before, count + len(targets))
            single_pass.restart()
            break
        else:
            if count < before:
                raise _read_once(before)
            return totals, count


def _read_once(count: int) -> DataError:
    return DataError(
        f"After {count} samples a check failed: the data must be read again from the start, but "
        "they can be read only once. Give a DataLoader or a list of batches."
    )


def _of_any_rank(names: set[str], all_names: list[str], groups: Any) -> set[str]:
    """Names that some rank has."""
    has = torch.tensor([name in names for name in all_names], dtype=torch.int32, device="cpu")
    found = sum_over(has, groups).tolist()
    return {name for name, count in zip(all_names, found, strict=True) if count}
