"""The public function: how much one sample's gradient step changes the predictions on others."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradmask.distributed import with_whole_parameters
from gradmask.errors import ModelError, OptionError, check_choice
from gradmask.fisher.adapter import Unpack, check_unpack
from gradmask.fisher.likelihood import KINDS, LOSSES, Loss, directional
from gradmask.fisher.losses import standard_loss
from gradmask.fisher.verify import Verify, check_verify
from gradmask.influence.forms import diagonal_forms, quadratic_forms
from gradmask.influence.problem import (
    Blocks,
    Problem,
    check_losses,
    check_memory,
    drawn_directions,
    guarded,
    precision,
)
from gradmask.influence.steps import divergences
from gradmask.measuring import measuring
from gradmask.parameters import trainable_parameters

METHODS = ("kl", "quadratic", "diagonal")


def influence(
    model: nn.Module,
    sources: Any,
    probe: Any,
    *,
    step: float = 1e-3,
    method: str = "quadratic",
    fisher: str = "exact",
    loss: Loss | None = None,
    pairwise: bool = False,
    seed: int = 0,
    memory: int = 1 << 30,
    verify: Verify = "spread",
    unpack: Unpack | None = None,
) -> Tensor:
    """KL( f(x; θ) ‖ f(x; θ − ε g_i) ) ≈ ½ ε² g_iᵀ F(x) g_i ≈ ½ ε² Σ_j a_jj g_ij².

    How far one plain gradient step of size ε on source i alone moves the predictions on probe
    samples x: `kl` (equation 3), `quadratic` (equation 4) and `diagonal` (equation 9) of L. Jiang,
    "Gradient mask and neural network generalization". All are in nats and contain ½ ε², which the
    paper leaves out of equations 8 and 9. g_i is the gradient of the source's loss, summed over
    its positions, by the trainable parameters; F(x) is the Fisher information at x, and a_jj the
    mean of its diagonal over the probe set. Positions of one sample (tokens, pixels) are
    independent given the logits, and their divergences add.

    The model runs in eval mode, and is left as it was, with its gradients, modes, hooks and
    running statistics, and the random state of PyTorch.

    Args:
        model: Any module that treats its samples (dimension 0) independently in eval mode.
        sources: `(inputs, targets)` of n samples, or a mapping of arguments with the targets among
            them, as for `fisher_diagonal`. Inputs are a tensor, or a tuple or dict of tensors that
            become the model's arguments.
        probe: Inputs of m samples; with `fisher="empirical"`, `(inputs, targets)`.
        step: ε, the learning rate of the step.
        method: `kl`, `quadratic` or `diagonal`.
        fisher: Labels of the Fisher information in the last two: `exact` (expectation over all
            labels), `sampled` (the same by one random direction in the logits of each probe
            sample) or `empirical` (the probe's targets).
        loss: `cross_entropy` (outputs are logits), `bernoulli` (independent binary logits), `mse`
            (outputs are the means of a Gaussian of unit variance) or, with `fisher="empirical"`, a
            callable `(outputs, targets)`: a negative log-likelihood. Default: `cross_entropy`, or
            with sources that are a mapping the one whose mean is the model's own loss.
        pairwise: Return every pair in place of the mean over the probe set.
        seed: Seed of the random directions.
        memory: Bytes that gradients and activations may take at a time, about; one sample's are
            held in any case.
        verify: What is checked against samples alone: `spread` (some, at growing intervals), `all`
            or False. What fails is measured one sample at a time.
        unpack: From sources (and a probe with targets) of another form to `(inputs, targets)`.

    Returns:
        Shape (n,), the mean over the probe set; with `pairwise`, shape (n, m). In the parameters'
        precision (float32 for half-precision parameters).

    Raises:
        OptionError: If an option is unknown, out of range or does not fit the others.
        ModelError: If the model has nothing to train, mixes samples by batch statistics, or is in
            shards.
        DataError: If there are no samples, labels are out of range, or the loss is not finite.
    """
    loss = standard_loss(loss)
    _check_options(step, method, fisher, loss, pairwise, memory)
    check_verify(verify)
    check_unpack(unpack)
    model = with_whole_parameters(model)
    parameters = trainable_parameters(model, loss)
    _check_derivatives(model)

    def measure(problem: Problem) -> Tensor:
        if method != "diagonal":  # whose own pass is as short
            check_losses(problem)
        if fisher == "sampled":
            drawn = drawn_directions(problem, seed)
            problem = replace(
                problem, probe=replace(problem.probe, targets=drawn, loss=directional)
            )
        if method == "diagonal":
            return 0.5 * step**2 * diagonal_forms(problem, verify)
        if method == "kl":
            return _collect(problem, divergences(problem, step), pairwise)
        return 0.5 * step**2 * _collect(problem, quadratic_forms(problem), pairwise)

    options: dict[str, Any] = {"sources": sources, "probe": probe, "loss": loss}
    options |= {"labelled": fisher == "empirical", "memory": memory, "verify": verify}
    options |= {"unpack": unpack}
    with measuring(model, parameters.values(), loss):
        values = guarded(measure, model, parameters, **options)
    return values.to(precision(parameters))


def _check_derivatives(model: nn.Module) -> None:
    """Refuse layers whose backward pass is not the derivative of their forward pass."""
    for name, module in model.named_modules():
        if getattr(module, "scale_grad_by_freq", False):
            raise ModelError(
                f"Layer {name!r} ({type(module).__name__}) has scale_grad_by_freq=True, so its "
                "gradient is not the derivative of the loss, and a step along it has no quadratic "
                "form: set module.scale_grad_by_freq = False while influence is measured."
            )


def _check_options(
    step: float, method: str, fisher: str, loss: Loss | None, pairwise: bool, memory: int
) -> None:
    check_choice("method", method, METHODS)
    check_choice("fisher", fisher, KINDS)
    if not (step > 0 and math.isfinite(step)):
        raise OptionError(f"step={step!r} must be positive and finite: it is a learning rate.")
    check_memory(memory)
    if isinstance(loss, str):
        check_choice("loss", loss, LOSSES)
    elif loss is not None and (method == "kl" or fisher != "empirical"):
        raise OptionError(
            "The distribution behind a callable loss is not known. Use loss='cross_entropy', "
            "'bernoulli' or 'mse', or fisher='empirical' with method='quadratic' or 'diagonal'."
        )
    if method == "kl" and fisher != "exact":
        raise OptionError(
            f"fisher={fisher!r} has no meaning for method='kl', which has no Fisher information: "
            "leave it out, and give the probe without targets."
        )
    if method == "diagonal" and pairwise:
        raise OptionError(
            "method='diagonal' uses the Fisher diagonal of the whole probe set, so it has no value "
            "for a pair: use pairwise=False, or method='quadratic'."
        )


def _collect(problem: Problem, blocks: Blocks, pairwise: bool) -> Tensor:
    n, m = problem.sources.count, problem.probe.count
    shape = (n, m) if pairwise else (n,)
    values = torch.zeros(shape, dtype=torch.float64, device=problem.device)
    with closing(blocks):  # an interrupted one gives the model back at once
        for rows, columns, found in blocks:
            if pairwise:
                values[rows, columns] = found
            else:
                values[rows] += found.sum(1) / m
    return values
