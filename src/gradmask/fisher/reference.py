"""Squared per-sample gradients by plain autograd, one sample at a time: slow and always right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradmask.fisher.likelihood import Loss, exact_terms, nll, part


def call(model: nn.Module, inputs: Any) -> Any:
    """Call the model: a tuple or list gives positional arguments, a dict gives keywords."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def zero_squares(parameter: Tensor) -> Tensor:
    """Zeros of a parameter's shape, contiguous, in its precision but at least float32."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)


def add_per_sample_squares(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    parameters: dict[str, nn.Parameter],
    totals: dict[str, Tensor],
    *,
    exact: bool = False,
    loss: Loss = "cross_entropy",
) -> None:
    """Add the sum over samples of squared per-sample gradients, by single-sample autograd.

    Args:
        model: The model, in eval mode.
        inputs: Inputs of N samples.
        targets: Targets, shape (N, ...).
        parameters: The parameters to differentiate by.
        totals: `{name: tensor of the parameter's shape}`, changed in place.
        exact: Take the expectation over all labels in place of the targets.
        loss: The negative log-likelihood.
    """
    for n in range(len(targets)):
        sample = slice(n, n + 1)
        outputs, target = call(model, part(inputs, sample)), part(targets, sample)
        terms = exact_terms(outputs, target, loss) if exact else [nll(outputs, target, loss)]
        for term in terms:
            gradients = torch.autograd.grad(
                term, list(parameters.values()), retain_graph=exact, allow_unused=True
            )
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    totals[name] += gradient.to_dense().to(totals[name].dtype).square()
