"""The paper's claims on influence and overfitting, tested on the runs of a comparison.

Equation 8 and figure 1: influence falls in training, and is lower where labels are random.
Figure 2: with a mask it falls more slowly, and so rises the test loss after its minimum.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradmask.study.arms import arm_title, controls, read_arm
from gradmask.study.results import without_diverged
from gradmask.study.statistics import Difference, Results, arms, paired_difference

FORMS = {
    "quadratic": "Equation 4 (quadratic form)",
    "diagonal": "Equation 9 (diagonal form)",
    "kl": "Equation 3 (exact divergence)",
}

FALLS = "influence is lower at the end of training than after the first measurement (figure 1)"
LOWER = "influence is lower on random labels (equation 8, figure 1), geometric mean over training"
LOWER_SUM = "the same of the arithmetic mean, which the highest epochs make"
LOWER_PER_NORM = "the same of influence ÷ squared gradient norm, geometric mean (not in the paper)"
SLOWER_FALL = "influence falls more slowly with a Fisher mask than without (figure 2a)"
SLOWER_RISE = "test loss rises more slowly with a Fisher mask than without (figure 2b)"
EQUATION_8 = (LOWER, LOWER_SUM, LOWER_PER_NORM)
SMALLER_RISE = "test loss rises less to the end of training with a Fisher mask than without"
CONTROL = " than with a random mask of the same size (control)"

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Finding:
    """One claim in one case.

    Attributes:
        claim: The claim.
        sentence: What was measured, with its 95 % interval.
        outcome: 1 if it holds, -1 if the opposite is shown, 0 if neither is.
    """

    claim: str
    sentence: str
    outcome: int


def forms(results: Results) -> list[str]:
    """Forms of influence that every run was measured with."""
    runs = [run.get("influence", []) for run in results["runs"]]
    return [
        form
        for form in FORMS
        if runs and all(len(run) > 1 and f"influence/{form}/mean" in run[0] for run in runs)
    ]


def series(results: Results, arm: str, name: str) -> dict[int, tuple[Array, Array]]:
    """Epochs, and the mean of one quantity of the monitor's records at them, by seed."""
    return {
        run["seed"]: (
            np.array([record["epoch"] for record in run["influence"]]),
            np.array([record[f"influence/{name}/mean"] for record in run["influence"]]),
        )
        for run in results["runs"]
        if run["arm"] == arm
    }


def findings(results: Results) -> list[Finding]:
    """Test each claim of the paper as far as there are runs for it.

    Args:
        results: Contents of `results.json`.

    Returns:
        Findings by paired differences over seeds; empty if influence was not monitored.
    """
    results = without_diverged(results)
    measured, present = forms(results), arms(results)
    # A rise an epoch, or from a minimum, is that of every epoch's loss.
    every = all("test_loss" in row for run in results["runs"] for row in run["epochs"])
    rises = RISES if every else ()
    if not measured:
        return []
    found = [_falls(results, arm, form) for form in measured for arm in present]
    for arm in present:
        other = _with_given_labels(arm)
        if other in present:
            for form in measured:
                found += [_lower(results, arm, other, form, claim) for claim in EQUATION_8]
    for arm in present:
        if read_arm(arm).strategy == "fisher":
            for other in controls(arm, present):
                found += [_slower_fall(results, arm, other, form) for form in measured]
                found += [_rise(results, arm, other, claim) for claim in rises]
    return found


def conclusion(found: list[Finding]) -> str:
    """Say of each claim in how many cases it holds in these runs."""
    parts = []
    for claim in dict.fromkeys(finding.claim for finding in found):
        outcomes = Counter(f.outcome for f in found if f.claim == claim)
        number = outcomes.total()
        words = {1: "holds", -1: "the opposite is shown", 0: "not shown"}
        cases = ", ".join(f"{word} in {outcomes[o]}" for o, word in words.items() if outcomes[o])
        parts.append(f"{claim[0].upper()}{claim[1:]}: {cases} of {number}.")
    return "\n".join(parts)


def overfitting_slope(losses: Array) -> float:
    """Slope of the test loss after its minimum, by least squares.

    Args:
        losses: Test loss after each epoch.

    Returns:
        Nats per epoch; NaN if fewer than two epochs follow the minimum.
    """
    after = losses[int(losses.argmin()) :]
    return _slope(np.arange(len(after), dtype=float), after) if len(after) > 2 else math.nan


def overfitting_rise(losses: Array) -> float:
    """Rise of the test loss from its minimum to the last epoch, in nats."""
    return float(losses[-1] - losses.min())


def decay(epochs: Array, influence: Array, start: float) -> float:
    """Slope of log influence in epochs from `start` on, by least squares; negative if it falls."""
    chosen = epochs >= start
    return _slope(epochs[chosen], _log(influence[chosen]))


# How the test loss rises after its minimum: a number, and its unit.
RISES: dict[str, tuple[Callable[[Array], float], str]] = {
    SLOWER_RISE: (overfitting_slope, " an epoch"),
    SMALLER_RISE: (overfitting_rise, " to the end"),
}


def _slope(x: Array, y: Array) -> float:
    return float(np.polyfit(x, y, 1)[0]) if len(x) > 1 else 0.0


def _log(values: Array | np.floating[Any]) -> Array:
    logs: Array = np.log(np.maximum(values, 1e-300))  # influence may underflow to zero
    return logs


def _with_given_labels(arm: str) -> str | None:
    """The arm that differs from this one in that its labels are not random."""
    parts = arm.split(":")
    return ":".join(p for p in parts if p != "labels=random") if "labels=random" in parts else None


def _falls(results: Results, arm: str, form: str) -> Finding:
    """From the first measurement after the start, which no choice was made for, to the last."""
    found = series(results, arm, form)
    epochs = next(iter(found.values()))[0]
    logs = np.mean([_log(values) for _, values in found.values()], axis=0)
    peak = int(logs.argmax())
    rise = math.exp(logs[peak] - logs[0])
    text = (
        f"{FORMS[form]}, {arm_title(arm)}: it is highest at epoch {epochs[peak]:g}, {rise:.3g} "
        f"times as high as at the start; against epoch {epochs[1]:g}, at the end it is"
    )
    last, first = ({s: float(_log(v)[i]) for s, (_, v) in found.items()} for i in (-1, 1))
    return _judge(FALLS, text, paired_difference(last, first), -1, True)


def _lower(results: Results, arm: str, other: str, form: str, claim: str) -> Finding:
    """Equation 8 over training, after the start: on random labels against given ones."""

    def level(name: str) -> dict[int, float]:
        values, norms = (series(results, name, key) for key in (form, "squared_norm"))
        if claim == LOWER_SUM:
            return {seed: float(_log(v[1:].mean())) for seed, (_, v) in values.items()}
        per = {seed: _log(n) if claim == LOWER_PER_NORM else 0.0 for seed, (_, n) in norms.items()}
        return {seed: float((_log(v) - per[seed])[1:].mean()) for seed, (_, v) in values.items()}

    kind = "arithmetic" if claim == LOWER_SUM else "geometric"
    what = f"{FORMS[form]}{' ÷ squared gradient norm' if claim == LOWER_PER_NORM else ''}"
    text = f"{what}, {arm_title(arm)}: its {kind} mean over training is, against "
    text += f"{arm_title(other)},"
    return _judge(claim, text, paired_difference(level(arm), level(other)), -1, True)


def _slower_fall(results: Results, arm: str, other: str, form: str) -> Finding:
    """From the epoch on at which both arms are past their highest, or the middle of training."""
    first, second = (series(results, name, form) for name in (arm, other))
    epochs = next(iter(second.values()))[0]
    start = float(epochs[min(max(_peak(first), _peak(second)), len(epochs) // 2)])
    rates = [
        {seed: decay(x, values, start) for seed, (x, values) in found.items()}
        for found in (first, second)
    ]
    here, there = (mean(rate.values()) for rate in rates)
    text = (
        f"{FORMS[form]}, {arm_title(arm)}: from epoch {start:g} on its logarithm changes by "
        f"{here:+.3f} an epoch, with {_named(other)} by {there:+.3f}, difference"
    )
    return _judge(_against(SLOWER_FALL, other), text, paired_difference(*rates), 1, False)


def _rise(results: Results, arm: str, other: str, claim: str) -> Finding:
    number, unit = RISES[claim]
    rises = [
        {
            run["seed"]: number(np.array([row["test_loss"] for row in run["epochs"]]))
            for run in results["runs"]
            if run["arm"] == name
        }
        for name in (arm, other)
    ]
    if any(map(math.isnan, [*rises[0].values(), *rises[1].values()])):
        text = f"Test loss, {arm_title(arm)}, against {_named(other)}: a minimum is at the end."
        return Finding(_against(claim, other), text, 0)
    here, there = (mean(rise.values()) for rise in rises)
    text = (
        f"Test loss, {arm_title(arm)}: after its minimum it rises by {here:.4f}{unit}, with "
        f"{_named(other)} by {there:.4f}, difference"
    )
    return _judge(_against(claim, other), text, paired_difference(*rises), -1, False)


def _named(arm: str) -> str:
    title = arm_title(arm)
    return title if read_arm(arm).strategy == "none" else f"the {title}"


def _against(claim: str, other: str) -> str:
    strategy = read_arm(other).strategy
    if strategy == "none":
        return claim
    return claim.replace(" than without", CONTROL.replace("random", strategy.replace("_", " ")))


def _peak(found: dict[int, tuple[Array, Array]]) -> int:
    """Where the geometric mean over seeds is highest."""
    return int(np.mean([_log(values) for _, values in found.values()], axis=0).argmax())


def _judge(
    claim: str, text: str, difference: Difference | None, expected: int, ratio: bool
) -> Finding:
    """A sentence with a difference, or as a ratio that of two logarithms, and what it shows."""
    if difference is None:
        return Finding(claim, f"{text} unknown: no seed in common.", 0)
    show = (lambda d: f"{math.exp(d):.3g}") if ratio else (lambda d: f"{d:+.4f}")
    value = f"{text} {show(difference.mean)}{' times as high' if ratio else ''}"
    if difference.low is None or difference.high is None:
        seeds = "one seed" if difference.n == 1 else "seeds without spread"
        return Finding(claim, f"{value}, from {seeds}: no interval, so nothing is shown.", 0)
    outcome = (1 if difference.mean * expected > 0 else -1) if difference.shown else 0
    word = {1: "the claim holds", -1: "the opposite of the claim", 0: "not shown"}[outcome]
    interval = f"95 % interval {show(difference.low)} to {show(difference.high)}"
    return Finding(claim, f"{value} ({interval}, {difference.n} seeds): {word}.", outcome)
