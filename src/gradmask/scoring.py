"""What a score needs, measured on data, and the score of every entry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gradmask.distributed import local, reshard, shard_like, unwrapped
from gradmask.errors import OptionError, check_choice
from gradmask.fisher import fisher_diagonal, gradient_moments
from gradmask.fisher.adapter import Unpack
from gradmask.fisher.likelihood import Loss
from gradmask.parameters import trainable_parameters
from gradmask.scores import SCORES, Score, apply_score
from gradmask.seeding import derive_seed, seeded_generator
from gradmask.selection import random_numbers


def find_score(name: str, kind: str = "empirical") -> Score:
    """A score by its name, if it can be measured with labels of a kind.

    Args:
        name: The name.
        kind: Labels of the Fisher information.

    Raises:
        OptionError: If there is no such score, or it is of the data's labels only.
    """
    check_choice("score", name, SCORES)
    if "mean" in SCORES[name].needs and kind != "empirical":
        raise OptionError(
            f"score={name!r} is of the mean gradient, which is 0 at the labels of kind={kind!r}: "
            "use kind='empirical'."
        )
    return SCORES[name]


def parameter_scores(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    score: str = "fisher",
    *,
    protect: Iterable[Any] | None = None,
    kind: str = "empirical",
    loss: Loss | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    group: ProcessGroup | None = None,
    unpack: Unpack | None = None,
    unused: set[str] | None = None,
) -> dict[str, Tensor]:
    """The score of every entry of the trainable parameters (`gradmask scores` lists them).

    Args:
        model: The model, wrapped if it is on many processes.
        loader: Batches (see `fisher_diagonal`); None for scores of the weights alone.
        score: Name of the score.
        protect: Batches of the data whose skills must stay: of a score that compares two data sets
            the second one.
        kind: Labels of the Fisher information: `empirical`, `sampled` or `exact`.
        loss: Negative log-likelihood.
        max_samples: Size of the random part of each data set that is measured (default: all).
        seed: Seed of random parts, drawn labels and random scores.
        group: Ranks that measure together.
        unpack: From a batch to `(inputs, targets)`.
        unused: A set to which the names are added on which no sample's loss depends.

    Returns:
        `{parameter name: tensor of the parameter's shape}`, never negative; DTensors for sharded
        parameters.

    Raises:
        OptionError: If an option is out of range, or data are missing or without use.
        ModelError: If the model cannot be measured.
        DataError: If the data cannot be used.
    """
    found = find_score(score, kind)
    options: dict[str, Any] = {"kind": kind, "loss": loss, "max_samples": max_samples}
    options |= {"group": group, "unpack": unpack, "unused": unused}
    return apply_score(found, measure(model, found, loader, protect, seed=seed, **options))


def check_data(score: Score, loader: Any, protect: Any) -> None:
    """Check that a score has the data it needs, and no others.

    Args:
        score: The score.
        loader: The data, or None.
        protect: The data to protect, or None.

    Raises:
        OptionError: If some are missing, or have no use.
    """
    if score.compares and (loader is None or protect is None):
        raise OptionError(
            f"score={score.name!r} compares two data sets: give a loader, and protect=old_loader."
        )
    if protect is not None and not score.compares:
        raise OptionError(
            f"score={score.name!r} is of one data set: give that alone, or take score='ratio'."
        )
    if score.reads_data and loader is None:
        raise OptionError(f"score={score.name!r} is measured on data: give a loader.")


def measure(
    model: nn.Module,
    score: Score,
    loader: Iterable[Any] | None,
    protect: Iterable[Any] | None = None,
    *,
    kind: str = "empirical",
    seed: int = 0,
    loss: Loss | None = None,
    unused: set[str] | None = None,
    **options: Any,
) -> dict[str, Mapping[str, Tensor]]:
    """Measure what a score needs.

    Args:
        model: The model.
        score: The score.
        loader: Batches of data, or None.
        protect: Batches of the data to protect, or None.
        kind: Labels of the Fisher information.
        seed: Seed.
        loss: Negative log-likelihood.
        unused: A set to which unused names are added.
        options: Others of `fisher_diagonal`.

    Returns:
        By what it is, `{parameter name: tensor}`. With the mean always the mean square as well.
    """
    check_data(score, loader, protect)
    options |= {"loss": loss}
    found: dict[str, Mapping[str, Tensor]] = {}
    if "mean" in score.needs:
        assert loader is not None
        moments = gradient_moments(model, loader, seed=seed, unused=unused, **options)
        found |= {"mean": moments.mean, "square": moments.square}
    elif "square" in score.needs:
        assert loader is not None
        found["square"] = fisher_diagonal(
            model, loader, kind=kind, seed=seed, unused=unused, **options
        )
    if score.compares:
        assert protect is not None
        seed_of_second = derive_seed(seed, "protected")
        found["protected"] = fisher_diagonal(
            model, protect, kind=kind, seed=seed_of_second, **options
        )
    return found | of_weights(model, score, loss, seed)


def of_weights(
    model: nn.Module, score: Score, loss: Loss | None, seed: int
) -> dict[str, Mapping[str, Tensor]]:
    """Measure what needs no data.

    Args:
        model: The model.
        score: The score.
        loss: Negative log-likelihood, whose parameters count as well.
        seed: Seed of random scores.
    """
    reshard(model := unwrapped(model))
    parameters = {name: p.detach() for name, p in trainable_parameters(model, loss).items()}
    found: dict[str, Mapping[str, Tensor]] = {}
    if "weight" in score.needs:
        found["weight"] = {
            name: shard_like(local(p).to(torch.promote_types(p.dtype, torch.float32), copy=True), p)
            for name, p in parameters.items()
        }
    if "random" in score.needs:
        found["random"] = random_numbers(parameters, seeded_generator(seed, "score"))
    return found
