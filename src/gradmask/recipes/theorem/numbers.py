"""Theorem 1 in numbers: one network's exact divergence against its leading order."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

import gradmask
from gradmask.recipes.theorem.config import FEWEST_POINTS

Labelled = tuple[Tensor, Tensor]  # inputs and labels

# The steps a slope is fitted over: the leading order is off by at most a tenth, so that the order
# after the next counts little, and the error is far above what rounding can do.
SMALL_ERROR = 0.1
ABOVE_ROUNDING = 100.0
KINDS = ("exact", "empirical")


def measure(
    model: nn.Module,
    sources: Labelled,
    probe: Labelled,
    steps: Sequence[float],
    rates: dict[str, float],
) -> dict[str, Any]:
    """Compare equations 3, 4 and 9 on every pair of a source and a probe sample.

    The slopes are of the mean over pairs of KL, of |KL − quadratic|, and of the median over pairs
    of the latter, each against ε on log-log axes.

    Args:
        model: The network, in eval mode; in float64, or rounding is all that is seen.
        sources: Samples that take a step each.
        probe: Samples whose predictions the steps move.
        steps: Step sizes ε, from small to large.
        rates: Named step sizes at which the relative error of each source is taken.

    Returns:
        Values for each step, slopes (None where fewer than three steps can be used), relative
        errors at `rates`, and the diagonal form against the full one.
    """
    inputs = probe[0]
    unit = gradmask.influence(
        model, sources, inputs, step=1.0, pairwise=True
    )  # the rest of it is ε²
    with torch.no_grad():
        largest = model(inputs).abs().max().item()
    rows: dict[str, list[float]] = {
        name: [] for name in ("kl", "quadratic", "error", "error_median", "rounding")
    }
    for step in steps:
        kl = gradmask.influence(model, sources, inputs, step=step, method="kl", pairwise=True)
        error = (kl - step**2 * unit).abs()
        rows["kl"].append(kl.mean().item())
        rows["quadratic"].append(step**2 * unit.mean().item())
        rows["error"].append(error.mean().item())
        rows["error_median"].append(error.median().item())
        # √(2 KL) is about the logits' change, which a rounding of the logits is multiplied by.
        spacing = torch.finfo(kl.dtype).eps * largest
        rows["rounding"].append(spacing * (2 * kl).sqrt().mean().item())
    fitted = fitted_points(rows)
    return {
        "steps": list(steps),
        **rows,
        "fitted": [steps[i] for i in fitted],
        "slopes": {
            name: slope(steps, rows[name], fitted) for name in ("kl", "error", "error_median")
        },
        "relative_error": {
            name: _relative_error(model, sources, inputs, unit, step)
            for name, step in rates.items()
        },
        "diagonal": _diagonal(model, sources, probe, unit.mean(1)),
    }


def fitted_points(rows: dict[str, list[float]]) -> list[int]:
    """Which steps are small, but not so small that the error is rounding."""
    values = zip(rows["error"], rows["quadratic"], rows["rounding"], strict=True)
    return [
        i
        for i, (error, quadratic, rounding) in enumerate(values)
        if ABOVE_ROUNDING * rounding < error <= SMALL_ERROR * quadratic
    ]


def slope(steps: Sequence[float], values: Sequence[float], chosen: Sequence[int]) -> float | None:
    """Least-squares slope of log value against log step; None with too few points."""
    if len(chosen) < FEWEST_POINTS or min(values[i] for i in chosen) <= 0:
        return None
    x, y = (np.log([series[i] for i in chosen]) for series in (steps, values))
    return float(np.polyfit(x, y, 1)[0])


def smooth_twin(model: nn.Module) -> nn.Module | None:
    """The same weights with SiLU in place of each ReLU: a network without kinks.

    It computes another function, for which the theorem's conditions hold everywhere: where a slope
    is missed with ReLU and met here, it is the kinks that make the difference.

    Args:
        model: Any network; left as it is.

    Returns:
        The other network, or None if the model has no `nn.ReLU`.
    """
    twin = copy.deepcopy(model)
    found = [
        (module, name)
        for module in twin.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ReLU)
    ]
    for module, name in found:
        setattr(module, name, nn.SiLU())
    return twin if found else None


def _relative_error(
    model: nn.Module, sources: Labelled, inputs: Tensor, unit: Tensor, step: float
) -> dict[str, float]:
    """|quadratic − KL| / KL of each source's mean over the probe set."""
    kl = gradmask.influence(model, sources, inputs, step=step, method="kl")
    quadratic = step**2 * unit.mean(1)
    # A source whose gradient is zero moves nothing, and both are 0 there.
    error = (quadratic - kl).abs() / kl.clamp_min(torch.finfo(kl.dtype).tiny)
    return {"step": step, "mean": error.mean().item(), "median": error.median().item()}


def _diagonal(
    model: nn.Module, sources: Labelled, probe: Labelled, exact: Tensor
) -> dict[str, dict[str, float]]:
    """Equation 9 against the full form with the same Fisher information, over sources."""
    # What a form that knows nothing of the Fisher information would rank by.
    norms = gradmask.gradient_norms(model, sources)
    found = {}
    for kind in KINDS:
        samples: Any = probe if kind == "empirical" else probe[0]
        full = exact
        if kind != "exact":
            full = gradmask.influence(model, sources, samples, step=1.0, fisher=kind)
        diagonal = gradmask.influence(
            model, sources, samples, step=1.0, fisher=kind, method="diagonal"
        )
        ratio = diagonal / full
        found[kind] = {
            "spearman": _spearman(diagonal, full),
            "spearman_of_norm": _spearman(norms, full),
            "ratio_median": ratio.median().item(),
            "ratio_min": ratio.min().item(),
            "ratio_max": ratio.max().item(),
        }
    return found


def _spearman(a: Tensor, b: Tensor) -> float:
    return float(stats.spearmanr(a.cpu().numpy(), b.cpu().numpy()).statistic)
