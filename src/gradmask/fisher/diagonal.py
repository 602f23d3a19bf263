"""The public function: the Fisher diagonal of a model over data."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset

from gradmask.errors import DataError, check_max_samples
from gradmask.fisher.capture import Capture, Way, Ways
from gradmask.fisher.likelihood import (
    Loss,
    check_likelihood,
    directional,
    draw_directions,
    exact_terms,
    nll,
    part,
)
from gradmask.fisher.reference import add_per_sample_squares, call, zero_squares
from gradmask.fisher.sampling import random_samples
from gradmask.parameters import measuring, trainable_parameters

logger = logging.getLogger("gradmask")


def fisher_diagonal(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    kind: str = "empirical",
    loss: Loss = "cross_entropy",
    max_samples: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information: a_jj = (1/n) Σ_i (∂ log f(x_i) / ∂θ_j)².

    Per-sample gradients are squared, THEN averaged over samples (equations 7 and 9 of L. Jiang,
    "Gradient mask and neural network generalization"). The pass runs in eval mode and leaves the
    model, its gradients, modes and running statistics, and the random state of PyTorch unchanged.

    Args:
        model: Any module that treats its samples (dimension 0) independently in eval mode.
        loader: Iterable of `(inputs, targets)` batches. Inputs are a tensor, or a tuple or dict
            of tensors that become the model's arguments.
        kind: `empirical` (the data's labels), `sampled` (the model's own distribution over
            labels, by one random direction in the logits of each sample) or `exact` (expectation
            over all labels: one backward pass for each class).
        loss: `cross_entropy` (outputs are logits), `bernoulli` (independent binary logits), or a
            callable `(outputs, targets)` that is a negative log-likelihood, with any reduction.
        max_samples: Measure on a seeded random part of the data of this size (default: all).
        seed: Seed of that part and of the random directions.

    Returns:
        `{parameter name: tensor of the parameter's shape}`, the mean over samples, in the
        parameter's precision (float32 for half-precision parameters).

    Raises:
        OptionError: If an option is unknown or does not fit the others.
        ModelError: If the model has nothing to train or mixes samples by batch statistics.
        DataError: If there are no batches or samples, a label is out of range, or the loss is not
            finite.
    """
    check_likelihood(kind, loss)
    check_max_samples(max_samples)
    check_batches(loader)
    parameters = trainable_parameters(model)
    device = next(iter(parameters.values())).device
    generator = torch.Generator().manual_seed(seed)
    safe: Ways | None = None
    seen: dict[str, str] = {}
    count = 0
    with measuring(model, parameters.values()):
        totals = {name: zero_squares(p) for name, p in parameters.items()}
        batches = loader if max_samples is None else random_samples(loader, max_samples, seed)
        for batch in batches:
            inputs, targets = unpack(batch, device)
            n = len(targets)
            if n == 0:
                continue
            if n > 1 and safe is None:
                safe = safe_ways(model, inputs, parameters)
            with Capture(model, parameters, n, safe if n > 1 else None) as capture:
                outputs = call(model, inputs)
                capture.resolve(outputs)
                if n > 1 and capture.selects:
                    capture.drop(capture.mixed(outputs))
                term_loss = loss
                if kind == "sampled":
                    targets = draw_directions(outputs, targets, loss, generator)
                    term_loss = directional
                if kind == "exact":
                    terms = exact_terms(outputs, targets, loss)
                else:
                    terms = iter([nll(outputs, targets, term_loss)])
                capture.add_squares(terms, totals)
                ways = {name: way[0][0] for name, way in capture.ways().items()}
                rest = {k: p for k, p in parameters.items() if k not in capture.handled}
                del outputs, terms
            ways |= dict.fromkeys(rest, "sample")
            _report({name: way for name, way in ways.items() if seen.get(name) != way})
            seen |= ways
            if rest:
                add_per_sample_squares(
                    model, inputs, targets, rest, totals, exact=kind == "exact", loss=term_loss
                )
            count += n
    if count == 0:
        raise DataError("The loader gave no samples: an iterator may be used up already.")
    return {name: total.div_(count) for name, total in totals.items()}


def safe_ways(model: nn.Module, inputs: Any, parameters: dict[str, nn.Parameter]) -> Ways:
    """How to measure each parameter: the first way that keeps samples apart, as seen on two.

    A dimension that only happens to be as long as the batch is not 2 long here as well, so it is
    not captured; if it is 2, the gradients of one sample's outputs reach the other's row.
    """
    refused: set[tuple[str, Way]] = set()
    while True:
        with Capture(model, parameters, 2, refused=refused) as probe:
            outputs = call(model, part(inputs, slice(2)))
            probe.resolve(outputs)
            ways, mixed = probe.ways(), probe.mixed(outputs)
        if not mixed:
            return ways
        refused |= {(name, ways[name]) for name in mixed}


def _report(ways: dict[str, str]) -> None:
    """Say which parameters have no rule, and so cost more."""
    for way, text in (
        ("module", "Run again one sample at a time, module by module"),
        ("sample", "Run again one sample at a time, with the whole model"),
    ):
        names = [name for name, found in ways.items() if found == way]
        if names:
            logger.info("%s (no rule applies): %s", text, ", ".join(names))


def check_batches(loader: Any) -> None:
    """Raise a DataError unless this can be read batch by batch."""
    if isinstance(loader, Dataset) or not isinstance(loader, Iterable):
        raise DataError(
            f"Expected batches of (inputs, targets), not a {type(loader).__name__}: a dataset goes "
            "into a torch.utils.data.DataLoader first."
        )


def unpack(batch: Any, device: torch.device) -> tuple[Any, Tensor]:
    """Move a batch to the device and check its form."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise DataError(
            f"The loader gave a {type(batch).__name__}: expected (inputs, targets) batches."
        )
    move = lambda t: t.to(device, non_blocking=True) if isinstance(t, Tensor) else t  # noqa: E731
    inputs, targets = tree_map(move, batch[0]), tree_map(move, batch[1])
    if not isinstance(targets, Tensor) or not targets.dim():
        raise DataError(
            f"The targets of a batch are a {type(targets).__name__}: expected a tensor of shape "
            "(samples, ...)."
        )
    sizes = {len(t) for t in tree_leaves((inputs, targets)) if isinstance(t, Tensor) and t.dim()}
    if len(sizes) != 1:
        raise DataError(
            f"A batch must hold tensors with the same number of samples; found {sorted(sizes)}."
        )
    return inputs, targets
