"""Selective synaptic dampening: weights that only the data to forget need are made smaller."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gradmask.distributed import all_ranks_raise, local, shard_groups, shard_like, unwrapped
from gradmask.errors import DataError, OptionError
from gradmask.fisher.adapter import Unpack
from gradmask.fisher.diagonal import fisher_diagonal
from gradmask.fisher.likelihood import Loss
from gradmask.parameters import trainable_parameters
from gradmask.selection import kept_counts


def dampen(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any],
    *,
    threshold: float = 10.0,
    strength: float = 1.0,
    kind: str = "empirical",
    loss: Loss | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    group: ProcessGroup | None = None,
    unpack: Unpack | None = None,
) -> dict[str, float]:
    """Make a trained model forget: θ_j ← θ_j · min(λ F_r,j / F_f,j, 1) where F_f,j > α F_r,j.

    F_f and F_r are the Fisher diagonals (`fisher_diagonal`, means over samples) on the data to
    forget and on those to retain. One pass over each, no training (J. Foster et al., "Fast machine
    unlearning without retraining through selective synaptic dampening", AAAI 2024, equations 5 and
    6). Both are measured before any weight is changed.

    Args:
        model: The trained model, whose trainable weights are changed.
        forget: Batches of the data to forget (see `fisher_diagonal`).
        retain: Batches of the data to retain.
        threshold: α, how many times as much information on `forget` singles a weight out; higher
            changes fewer weights. The paper uses 10 for ResNets and vision transformers.
        strength: λ, at or below which a ratio makes a weight smaller; lower changes them more.
        kind: Labels of the Fisher information: `empirical`, `sampled` or `exact`.
        loss: Negative log-likelihood (see `fisher_diagonal`).
        max_samples: Size of the random part of each data set that is measured (default: all).
        seed: Seed of random parts and drawn labels.
        group: Ranks that measure together (default: those the model is wrapped for).
        unpack: From a batch to `(inputs, targets)`.

    Returns:
        Share of the entries of each parameter that were made smaller, by name.

    Raises:
        OptionError: If an option is out of range.
        ModelError: If the model cannot be measured.
        DataError: If the data cannot be used. No weight is changed then.
    """
    for name, value in {"threshold": threshold, "strength": strength}.items():
        if not isinstance(value, Real) or not 0 < value < math.inf:
            raise OptionError(f"{name}={value!r} must be positive and finite.")
    options: dict[str, Any] = {"kind": kind, "loss": loss, "max_samples": max_samples}
    options |= {"seed": seed, "group": group, "unpack": unpack}
    of_forget = fisher_diagonal(model, forget, **options)
    of_retain = fisher_diagonal(model, retain, **options)
    parameters = trainable_parameters(unwrapped(model), loss)
    with all_ranks_raise(shard_groups(parameters.values()), "checking the Fisher information"):
        _check_finite(of_forget, "forget")
        _check_finite(of_retain, "retain")
    smaller: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, weight in parameters.items():
            to_forget, to_retain = local(of_forget[name]), local(of_retain[name])
            # Infinite or NaN where nothing is to be forgotten, which is not used.
            factor = (strength * to_retain / to_forget).clamp(max=1.0)
            factor = torch.where(to_forget > threshold * to_retain, factor, 1.0)
            local(weight).mul_(factor.to(weight.dtype))
            smaller[name] = shard_like(factor < 1.0, weight)
    counts = kept_counts(smaller)
    return {name: counts[name] / max(1, p.numel()) for name, p in parameters.items()}


def _check_finite(fisher: dict[str, Tensor], data: str) -> None:
    for name, values in fisher.items():
        if not local(values).isfinite().all():
            raise DataError(
                f"The Fisher information of {name!r} on the data to {data} is NaN or infinite: "
                "look for a gradient that is not finite, or data of a wrong scale. No weight was "
                "changed."
            )
