"""How well scores find samples that are known: precision@k, AUROC, and a fair choice of the score.

A score's epoch rule and order (whether high or low values are suspicious) are chosen on one seed
and reported on the others, for baselines and influence alike.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from gradmask.recipes.audit.scores import AUDIT_SCORES, AuditScore
from gradmask.study.statistics import Difference, paired_difference, summarise

MEAN, MEAN_RANK = "mean", "mean rank"
# Scores of one seed: {form: {epoch rule: one value a sample}}.
Scores = dict[str, dict[str, Tensor]]
FIXED_KS = (10, 50, 100)


@dataclass(frozen=True)
class Choice:
    """A score with its epoch rule and order.

    Attributes:
        form: Name of the score.
        rule: `epoch N`, `mean` or `mean rank` over the saved epochs.
        high: Whether high values are suspicious.
    """

    form: str
    rule: str
    high: bool

    def of(self, scores: Scores) -> Tensor:
        """The score with high values suspicious."""
        values = scores[self.form][self.rule]
        return values if self.high else -values


def by_rule(epochs: dict[int, Tensor]) -> dict[str, Tensor]:
    """A score at each epoch, and averaged: its values, and its ranks (each epoch counts alike).

    Args:
        epochs: Values by epoch, in order.

    Returns:
        Values by epoch rule.
    """
    stacked = torch.stack(list(epochs.values()))
    found = {f"epoch {epoch}": values for epoch, values in epochs.items()}
    return found | {MEAN: stacked.mean(0), MEAN_RANK: _ranks(stacked).mean(0)}


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0 in each row; equal values have the mean of theirs."""
    ordered = values.sort(1).values.contiguous()
    below = torch.searchsorted(ordered, values.contiguous())
    upto = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + upto - 1).double() / 2


def auroc(scores: Tensor, wanted: Tensor) -> float:
    """Probability that a wanted sample has a higher score than another; ties count half.

    Args:
        scores: One value for each sample.
        wanted: Which samples are to be found, some but not all.

    Returns:
        A number in [0, 1]; 0.5 is chance.
    """
    return float(roc_auc_score(wanted.numpy(), scores.numpy()))


def precision_at(scores: Tensor, wanted: Tensor, k: int) -> float:
    """Share of wanted samples among the k with the highest scores.

    Args:
        scores: One value for each sample.
        wanted: Which samples are to be found.
        k: How many are looked at.

    Returns:
        A share in [0, 1].
    """
    return wanted[ranking(scores)[:k]].double().mean().item()


def ranking(scores: Tensor) -> Tensor:
    """Indices from the highest score to the lowest; equal ones in the order of the data."""
    return scores.argsort(descending=True, stable=True)


def choose(scores: Scores, wanted: Tensor) -> dict[str, Choice]:
    """For each form, the epoch rule and order with the highest AUROC on one seed."""
    chosen = {}
    for form, rules in scores.items():
        found = {rule: auroc(values, wanted) for rule, values in rules.items()}
        rule = max(found, key=lambda name: abs(found[name] - 0.5))
        chosen[form] = Choice(form, rule, found[rule] >= 0.5)
    return chosen


def usual() -> dict[str, Choice]:
    """Each form's mean over epochs, in the order found in `results/audit`."""
    return {form.name: Choice(form.name, MEAN, form.high) for form in AUDIT_SCORES}


@dataclass(frozen=True)
class Detection:
    """How well each form finds the wrong labels.

    Attributes:
        chosen_on: The seed on which epoch rules, orders and the best forms were chosen; None if
            there is one seed only: then the mean over epochs, in the order that `AuditScore` has.
        seeds: The seeds that are reported.
        ks: Numbers of samples looked at; the last is the number of wrong labels.
        choices: Epoch rule and order of each form.
        aurocs: `{form: {seed: AUROC}}` of the choices.
        precisions: `{form: {k: {seed: precision}}}` of the choices.
        all_aurocs: `{seed: {form: {rule: AUROC}}}` with high values suspicious, all seeds.
        best: The form of influence with the highest AUROC where choices were made.
        best_baseline: The baseline with the highest AUROC there.
    """

    chosen_on: int | None
    seeds: tuple[int, ...]
    ks: tuple[int, ...]
    choices: dict[str, Choice]
    aurocs: dict[str, dict[int, float]]
    precisions: dict[str, dict[int, dict[int, float]]]
    all_aurocs: dict[int, dict[str, dict[str, float]]]
    best: str
    best_baseline: str

    def difference(self, k: int | None = None) -> Difference | None:
        """Best form of influence minus best baseline: AUROC, or precision among k samples."""
        influence, baseline = (
            self.aurocs[form] if k is None else self.precisions[form][k]
            for form in (self.best, self.best_baseline)
        )
        return paired_difference(influence, baseline)

    def to_plain(self) -> dict[str, Any]:
        """As `audit.json` has it."""
        return {
            "chosen_on": self.chosen_on,
            "seeds": list(self.seeds),
            "best": self.best,
            "best_baseline": self.best_baseline,
            "difference": {
                name: vars(found)
                for name, k in (("auroc", None), (f"precision@{self.ks[-1]}", self.ks[-1]))
                if (found := self.difference(k)) is not None
            },
            "forms": {
                form: {
                    **asdict(choice),
                    "auroc": _summary(self.aurocs[form]),
                    **{f"precision@{k}": _summary(self.precisions[form][k]) for k in self.ks},
                }
                for form, choice in self.choices.items()
            },
            "auroc_of_high_values": self.all_aurocs,
        }


def detect(scores: dict[int, Scores], wrong: dict[int, Tensor]) -> Detection:
    """Choose on the first seed, report on the others.

    Args:
        scores: Scores by seed.
        wrong: Which samples have a wrong label, by seed; as many in each.

    Returns:
        What was chosen and found.
    """
    first, *others = scores
    seeds = tuple(others or [first])
    choices = choose(scores[first], wrong[first]) if others else usual()
    count = int(wrong[first].sum())
    ks = (*(k for k in FIXED_KS if k < count), count)
    quality = {f: auroc(c.of(scores[first]), wrong[first]) for f, c in choices.items()}
    return Detection(
        chosen_on=first if others else None,
        seeds=seeds,
        ks=ks,
        choices=choices,
        aurocs={
            f: {seed: auroc(c.of(scores[seed]), wrong[seed]) for seed in seeds}
            for f, c in choices.items()
        },
        precisions={
            f: {
                k: {seed: precision_at(c.of(scores[seed]), wrong[seed], k) for seed in seeds}
                for k in ks
            }
            for f, c in choices.items()
        },
        all_aurocs={
            seed: {
                form: {rule: auroc(values, wrong[seed]) for rule, values in rules.items()}
                for form, rules in found.items()
            }
            for seed, found in scores.items()
        },
        best=_best(quality, [form for form in AUDIT_SCORES if not form.baseline]),
        best_baseline=_best(quality, [form for form in AUDIT_SCORES if form.baseline]),
    )


def _best(quality: dict[str, float], forms: list[AuditScore]) -> str:
    return max((form.name for form in forms), key=lambda name: quality[name])


def _summary(values: dict[int, float]) -> dict[str, Any]:
    return {"by_seed": values, **vars(summarise(list(values.values())))}
