"""Squared per-sample gradients by plain autograd, one sample at a time: slow and always right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradmask.containers import map_tensors, part, sample_count, tensors_in
from gradmask.errors import ModelError
from gradmask.fisher.calls import full_precision
from gradmask.fisher.likelihood import Loss, NotFiniteError, exact_terms
from gradmask.fisher.losses import nll
from gradmask.fisher.rules import squared
from gradmask.fisher.scored import call
from gradmask.fisher.verify import rounding

# What models and losses raise where the number of samples does not suit them.
UNFIT = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)


def zero_squares(parameter: Tensor) -> Tensor:
    """Zeros of a parameter's shape, contiguous, real, in its precision but at least float32."""
    dtype = torch.promote_types(parameter.dtype.to_real(), torch.float32)
    return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)


def zero_means(parameter: Tensor) -> Tensor:
    """Zeros of a parameter's shape, contiguous, in its precision but at least float32."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)


class Squares(dict[str, Tensor]):
    """Sums of squares by name, each zero, and made, when it is first asked for.

    Args:
        parameters: What they are of, by name.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self._parameters = parameters

    def __missing__(self, name: str) -> Tensor:
        self[name] = zero_squares(self._parameters[name])
        return self[name]


def alone(
    model: nn.Module, inputs: Any, n: int, evaluate: Callable[[Any, int, bool], Any]
) -> tuple[Any, int]:
    """Run one sample by itself; twice in one batch where the model takes no batch of one.

    Args:
        model: The model, in eval mode.
        inputs: Inputs of several samples.
        n: Which of them.
        evaluate: Takes the outputs, the number of copies in them, and whether they are of one
            sample alone.

    Returns:
        What `evaluate` returned, and the number of copies.
    """
    sample = part(inputs, slice(n, n + 1))
    try:
        return evaluate(call(model, sample), 1, True), 1
    except NotFiniteError:
        raise
    except UNFIT as error:
        twice = map_tensors(lambda t: torch.cat([t] * 2) if t.dim() else t, sample)
        try:  # `squeeze` may have taken the samples away, or the model refuses a batch of one
            found = evaluate(outputs := call(model, twice), 2, False), 2
        except Exception:
            raise error from None
        _check_apart(model, inputs, n, outputs)
        return found


def _check_apart(model: nn.Module, inputs: Any, n: int, twice: Any) -> None:
    """A sample that cannot run alone must give the same beside itself and beside another."""
    count = sample_count(inputs)
    if count < 2:
        return
    with torch.no_grad():
        beside = call(model, part(inputs, [n, (n + 1) % count]))
    for a, b in zip(tensors_in(twice), tensors_in(beside), strict=False):
        near = 1e-6 if a.dtype == torch.float64 else 1e-2
        if a.dim() and a.shape == b.shape and not a.detach()[0].allclose(b[0], near, near):
            raise ModelError(
                "The model takes no batch of one, and what it gives for a sample depends on the "
                "others in its batch: a sample has no gradient of its own."
            )


def check_independent(
    model: nn.Module, inputs: Any, rows: Iterable[int], precision: torch.dtype
) -> None:
    """Refuse a model whose outputs for a sample depend on the others in its batch.

    Args:
        model: The model, in eval mode.
        inputs: Inputs of several samples.
        rows: The samples to run alone.
        precision: What the model computes in.

    Raises:
        ModelError: If they do.
    """
    count = sample_count(inputs)
    with torch.no_grad():
        batch = tensors_in(call(model, inputs))
        for row in rows:
            try:
                sample = tensors_in(call(model, part(inputs, slice(row, row + 1))))
            except UNFIT:  # it takes no batch of one
                return
            pairs = [
                (one[0], many[row]) if len(one) == 1 else (one, many)
                for one, many in zip(sample, batch, strict=False)
                if one.dim()
                and len(many) == count
                and one.shape[1:] == many.shape[1:]
                # If alone it has as many rows as in the batch, they are other samples.
                and len(one) in (1, count)
            ]
            if _differ(pairs, rounding(precision), 32 * torch.finfo(precision).eps):
                raise ModelError(
                    "What the model gives for a sample depends on the others in its batch, so a "
                    "sample has no gradient of its own. If time comes first (batch_first=False), "
                    "dimension 0 of a batch is not its samples: put the samples there, in inputs "
                    "and targets, and transpose inside forward. If the model is meant so "
                    "(statistics or a capacity of the batch), measure on batches of one."
                )


def _differ(pairs: list[tuple[Tensor, Tensor]], relative: float, noise: float) -> bool:
    """Whether tensors differ by more than rounding: of theirs, or of the largest of all."""
    inexact = [p for p in pairs if p[0].is_floating_point() or p[0].is_complex()]
    found = [[_numbers(t) for t in pair] for pair in inexact]
    if any((a.isfinite() != b.isfinite()).any() for a, b in found):
        return True
    found = [[t.nan_to_num(0.0, 0.0, 0.0) for t in pair] for pair in found]
    largest = max((t.abs().max().item() for pair in found for t in pair if t.numel()), default=0.0)
    return any(
        (a - b).norm() > relative * max(a.norm(), b.norm()) + noise * largest * a.numel() ** 0.5
        for a, b in found
    )


def _numbers(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()


def check_repeatable(model: nn.Module, inputs: Any, row: int, precision: torch.dtype) -> None:
    """Refuse a model that gives the same sample different outputs each time.

    Args:
        model: The model, in eval mode.
        inputs: Inputs of some samples.
        row: The sample to run twice.
        precision: What the model computes in.
    """
    sample = part(inputs, slice(row, row + 1))
    try:
        with torch.no_grad():
            first, second = call(model, sample), call(model, sample)
    except UNFIT:  # it takes no batch of one
        return
    near = 10 * torch.finfo(precision).eps
    for a, b in zip(tensors_in(first), tensors_in(second), strict=False):
        if a.shape == b.shape and not torch.allclose(a, b, rtol=near, atol=0, equal_nan=True):
            raise ModelError(
                "The model gives the same sample other outputs each time, in eval mode: its "
                "forward pass is random or changes its own state (a counter, a moving average, a "
                "memory), so a sample has no gradient of its own. Switch that off."
            )


def sample_gradients(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    parameters: dict[str, nn.Parameter],
    *,
    exact: bool = False,
    loss: Loss = "cross_entropy",
    rows: slice = slice(None),
    skip: frozenset[int] = frozenset(),
) -> Iterator[dict[str, Tensor]]:
    """Gradients of one sample's loss after the other, by single-sample autograd.

    Args:
        model: The model, in eval mode.
        inputs: Inputs of N samples.
        targets: Targets, shape (N, ...).
        parameters: The parameters to differentiate by.
        exact: Yield those of each term whose squares add up to the expectation over all labels.
        loss: The negative log-likelihood.
        rows: Samples to run.
        skip: Samples whose gradient is known to be zero.

    Yields:
        `{name: gradient}`, without those that are zero.
    """
    for n in range(*rows.indices(len(targets))):
        if n in skip:
            continue

        def terms(outputs: Any, copies: int, by_itself: bool, n: int = n) -> list[Tensor]:
            target = part(targets, slice(n, n + 1))
            target = torch.cat([target] * copies)
            if exact:
                return list(exact_terms(outputs, target, loss))
            return [nll(outputs, target, loss, alone=by_itself).total]

        yield from gradients_alone(model, inputs, n, parameters, terms)


def gradients_alone(
    model: nn.Module,
    inputs: Any,
    n: int,
    parameters: dict[str, nn.Parameter],
    terms: Callable[[Any, int, bool], list[Tensor]],
) -> Iterator[dict[str, Tensor]]:
    """Gradients of one sample, run by itself.

    Args:
        model: The model, in eval mode.
        inputs: Inputs of several samples.
        n: Which of them.
        parameters: The parameters to differentiate by.
        terms: The scalars to differentiate; takes what `alone` gives.

    Yields:
        `{name: gradient}` of each term, without parameters that it does not depend on.
    """
    with torch.enable_grad():
        found, copies = alone(model, inputs, n, terms)
    for term in found:
        if term.grad_fn is None:  # all is ignored
            continue
        gradients = torch.autograd.grad(
            term, list(parameters.values()), retain_graph=len(found) > 1, allow_unused=True
        )
        pairs = zip(parameters, gradients, strict=True)
        yield {name: g.to_dense() / copies for name, g in pairs if g is not None}


def add_per_sample_squares(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    parameters: dict[str, nn.Parameter],
    totals: dict[str, Tensor],
    means: dict[str, Tensor] | None = None,
    **options: Any,
) -> set[str]:
    """Add the sum over samples of squared per-sample gradients, by single-sample autograd.

    Args:
        model: The model, in eval mode.
        inputs: Inputs of N samples.
        targets: Targets, shape (N, ...).
        parameters: The parameters to differentiate by.
        totals: `{name: tensor of the parameter's shape}`, changed in place.
        means: Sums of the gradients themselves, changed in place; None if not wanted.
        options: Those of `sample_gradients`.

    Returns:
        Names on which some sample's loss depends.
    """
    reached: set[str] = set()
    for gradients in sample_gradients(model, inputs, targets, parameters, **options):
        reached |= gradients.keys()
        for name, gradient in gradients.items():
            totals[name] += squared(full_precision(gradient))
            if means is not None:
                means[name] += gradient
    return reached
