"""The scores of a sample, by name: formula, which values are suspicious, and who proposed it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """What one number says of a sample.

    Attributes:
        name: Key in tables and files.
        formula: In words and signs, over the visits t = 1 … n of training to the sample.
        high: Whether high values are suspicious; None if neither end is.
        source: Who proposed it.
        cost: What it takes beside training.
    """

    name: str
    formula: str
    high: bool | None
    source: str
    cost: str = "none"


_ALL = (
    Score(
        "area_under_margin",
        "mean of z_y - max_{k≠y} z_k",
        False,
        "Pleiss et al., 2020 (AUM)",
    ),
    Score("cumulative_loss", "mean of -log p_y, nats", True, "Huang et al., 2019 (O2U-Net)"),
    Score("mean_probability", "mean of p_y", False, "Swayamdipta et al., 2020 (confidence)"),
    Score(
        "wrong_share", "share of visits with max_k p_k not at y", True, "Swayamdipta et al., 2020"
    ),
    Score(
        "forgetting_events",
        "visits that are wrong after a right one",
        True,
        "Toneva et al., 2019",
    ),
    Score(
        "learning_time",
        "first visit after which all are right (n + 1: none)",
        True,
        "Toneva et al., 2019",
    ),
    Score("variability", "standard deviation of p_y", None, "Swayamdipta et al., 2020"),
    Score("early_margin", "area_under_margin of the first n / 2 visits", False, "Liu et al., 2020"),
    Score("late_margin", "area_under_margin of the last n / 2 visits", False, "Liu et al., 2020"),
    Score("last_loss", "-log p_y of the last visit, in half precision", True, ""),
    Score("visits", "n", None, ""),
    Score(
        "gradient_norm", "‖g‖, at the model's weights", True, "Paul et al., 2021 (GraNd)", "1 pass"
    ),
    Score(
        "self_influence",
        "½ ε² ‖g‖⁴: the step of the sample on itself (equation 4)",
        True,
        "Jiang, equation 4; Pruthi et al., 2020 (TracIn)",
        "1 pass",
    ),
    Score(
        "gradient_agreement",
        "cosine of g and the mean gradient of its label's samples",
        False,
        "Fort et al., 2019 (stiffness)",
        "3 passes",
    ),
    Score(
        "influence",
        "½ ε² mean over a probe set of gᵀ F g (equation 4)",
        True,
        "Jiang, equation 4",
        "1 pass for each few hundred probe samples",
    ),
)

SCORES = {score.name: score for score in _ALL}

# Weights of the combined rank, of each score's rank: chosen on scikit-learn's digits, in short and
# long trainings, by results/audit-dynamics/fit.py.
COMBINED = {"area_under_margin": 0.9, "cumulative_loss": 0.1}


def combined(scores: Mapping[str, Tensor]) -> Tensor:
    """The combined rank of each sample, in [0, 1]; NaN where a score is not known.

    Args:
        scores: By name, one value a sample.
    """
    total = sum(COMBINED.values())
    ranks = {
        name: suspicion_share(scores[name], bool(SCORES[name].high)) * (weight / total)
        for name, weight in COMBINED.items()
    }
    return torch.stack(list(ranks.values())).sum(0)


def suspicion_share(values: Tensor, high: bool) -> Tensor:
    """Share of the samples that are less suspicious, equal ones half; NaN stays NaN.

    Args:
        values: A score of each sample.
        high: Whether high values are suspicious.
    """
    known = values.isfinite()
    ordered = (values if high else -values)[known].sort().values
    found = (values if high else -values).contiguous()
    below = torch.searchsorted(ordered, found)
    upto = torch.searchsorted(ordered, found, right=True)
    share = (below + upto).double() / (2 * max(1, len(ordered)))
    return torch.where(known, share, torch.nan)


def highest(values: Tensor, among: Tensor, count: int) -> Tensor:
    """Where the largest values are; of equal ones the first.

    Args:
        values: One of each sample.
        among: The samples to choose from; those whose value is NaN are not chosen.
        count: How many.

    Returns:
        A bool tensor of the same shape.
    """
    among = among & ~values.isnan()
    order = torch.where(among, values, -torch.inf).argsort(descending=True, stable=True)
    return among & torch.zeros_like(among).scatter(0, order[:count], True)
