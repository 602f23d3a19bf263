"""What the runs of a comparison show: means over seeds, paired differences, plain sentences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from scipy import stats

from gradmask.experiments.arms import arm_title, baseline, controls, parse_arm
from gradmask.experiments.results import Results as Results
from gradmask.experiments.results import diverged_at, without_diverged

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Metric:
    """One number of a run.

    Attributes:
        name: Key in `results.json`.
        title: Column title.
        of: Computes the number from the run's epochs.
        percent: Shown as a percentage.
        higher_is_better: Direction of an improvement.
    """

    name: str
    title: str
    of: Callable[[Rows], float]
    percent: bool
    higher_is_better: bool

    def show(self, value: float, signed: bool = False) -> str:
        """Write a value (on the scale 0 to 1 for percentages) as the tables do."""
        sign = "+" if signed else ""
        return f"{100 * value:{sign}.1f}" if self.percent else f"{value:{sign}.3f}"


def chosen_epoch(rows: Rows) -> dict[str, Any]:
    """The epoch that validation chooses: highest accuracy, then lowest loss, then earliest."""
    return max(rows, key=lambda row: (row["val_accuracy"], -row["val_loss"], -row["epoch"]))


METRICS = (
    Metric("last_accuracy", "last epoch", lambda r: float(r[-1]["test_accuracy"]), True, True),
    Metric(
        "chosen_accuracy",
        "chosen epoch",
        lambda r: float(chosen_epoch(r)["test_accuracy"]),
        True,
        True,
    ),
    Metric("best_accuracy", "best epoch", lambda r: max(e["test_accuracy"] for e in r), True, True),
    Metric("last_test_loss", "test loss", lambda r: float(r[-1]["test_loss"]), False, False),
    Metric("last_train_loss", "train loss", lambda r: float(r[-1]["train_loss"]), False, False),
    Metric("memorised", "memorised", lambda r: float(r[-1]["memorised"]), True, False),
)

# The two numbers a verdict rests on: neither is chosen on the test set.
JUDGED = ("chosen_accuracy", "last_test_loss")


@dataclass(frozen=True)
class Summary:
    """Mean ± standard deviation (n − 1) over seeds; `std` is None for one seed.

    Without any, the mean is NaN, and shown as "diverged".
    """

    mean: float
    std: float | None
    n: int

    def show(self, form: Callable[[float], str]) -> str:
        """As `mean ± std`, each number written by a function."""
        if not self.n:
            return "diverged"
        text = form(self.mean)
        return text if self.std is None else f"{text} ± {form(self.std)}"


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences with its 95 % t-interval; no interval for one seed."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def shown(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def available(results: Results) -> list[Metric]:
    """Metrics that every run of the results has that did not diverge."""
    rows = [row for run in without_diverged(results)["runs"] for row in run["epochs"]]
    noise = bool(rows) and all("memorised" in row for row in rows)
    return [metric for metric in METRICS if metric.name != "memorised" or noise]


def arms(results: Results) -> list[str]:
    """Arms that have runs, in the order they have there: that of the options."""
    return list(dict.fromkeys(run["arm"] for run in results["runs"]))


def values(results: Results, arm: str, metric: Metric) -> dict[int, float]:
    """The metric of every run of an arm that did not diverge, by seed."""
    return {
        run["seed"]: metric.of(run["epochs"])
        for run in results["runs"]
        if run["arm"] == arm and diverged_at(run) is None
    }


def divergences(results: Results) -> list[str]:
    """Say of each arm which of its runs diverged; they are in no mean, difference or figure."""
    sentences = []
    for arm in arms(results):
        found = {run["seed"]: diverged_at(run) for run in results["runs"] if run["arm"] == arm}
        title = arm_title(arm)
        sentences += left_out(
            f"{title[0].upper()}{title[1:]}", found, "means, differences and figures"
        )
    return sentences


def left_out(title: str, epochs: dict[int, int | None], where: str) -> list[str]:
    """A sentence on the runs of one kind that diverged, if any did.

    Args:
        title: What they are runs of.
        epochs: When each of them diverged, or None, by seed.
        where: What they are left out of.
    """
    gone = [f"seed {seed} in epoch {at}" for seed, at in epochs.items() if at is not None]
    told = f"{title}: {len(gone)} of {len(epochs)} runs diverged, left out of all {where}"
    return [f"{told}: {', '.join(gone)}."] if gone else []


def summarise(numbers: list[float]) -> Summary:
    """Mean and standard deviation.

    Args:
        numbers: One number per seed.

    Returns:
        The summary.
    """
    std = stdev(numbers) if len(numbers) > 1 else None
    return Summary(mean(numbers) if numbers else math.nan, std, len(numbers))


def paired_difference(ours: dict[int, float], theirs: dict[int, float]) -> Difference | None:
    """Mean of `ours − theirs` over the seeds both have, with a 95 % t-interval.

    Args:
        ours: Number by seed.
        theirs: Number by seed.

    Returns:
        The difference, or None without a common seed.
    """
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not differences:
        return None
    summary = summarise(differences)
    if summary.std is None:
        return Difference(summary.mean, None, None, 1)
    half = float(stats.t.ppf(0.975, summary.n - 1)) * summary.std / math.sqrt(summary.n)
    return Difference(summary.mean, summary.mean - half, summary.mean + half, summary.n)


def compare_arms(results: Results, arm: str, baseline: str, metric: Metric) -> Difference | None:
    """Paired difference of two arms of a comparison, None if they share no seed."""
    return paired_difference(values(results, arm, metric), values(results, baseline, metric))


def verdicts(results: Results) -> list[str]:
    """Say in plain sentences whether each Fisher mask helped, and against which control.

    Args:
        results: Contents of `results.json`.

    Returns:
        One sentence per arm with runs that diverged, one per Fisher mask, judged metric and
        compared arm, and a conclusion at the end.
    """
    sentences, conclusions = divergences(results), []
    judged = [metric for metric in METRICS if metric.name in JUDGED]
    for ours in (arm for arm in arms(results) if parse_arm(arm).strategy == "fisher"):
        others = controls(ours, arms(results))
        outcome: dict[tuple[str, str], int] = {}
        for metric in judged:
            for other in others:
                difference = compare_arms(results, ours, other, metric)
                if difference is not None:
                    outcome[metric.name, other] = _sign(metric, difference)
                    sentences.append(_sentence(metric, ours, other, difference))
        if not values(results, ours, judged[0]):
            conclusions.append(f"Conclusion on the {arm_title(ours)} in this run: it diverged.")
        elif others:
            conclusions.append(_conclusion(judged, ours, others, outcome))
    if not conclusions:
        conclusions = ["Nothing to conclude: the Fisher mask and another arm are both needed."]
    return [*sentences, "\n".join(conclusions)]


def _sign(metric: Metric, difference: Difference) -> int:
    """1 if better beyond the interval, -1 if worse, 0 if neither is shown."""
    if not difference.shown:
        return 0
    return 1 if (difference.mean > 0) == metric.higher_is_better else -1


def _sentence(metric: Metric, ours: str, other: str, difference: Difference) -> str:
    what = {
        "chosen_accuracy": "Test accuracy at the epoch chosen on validation",
        "last_test_loss": "Test loss of the last epoch",
    }[metric.name]
    unit = " points" if metric.percent else ""
    text = f"{what}: the {arm_title(ours)} is {metric.show(difference.mean, signed=True)}{unit}"
    text += f" against {_named(other)}"
    if difference.low is None or difference.high is None:
        return f"{text}, from one seed: no interval, so nothing is shown."
    low, high = (metric.show(x, signed=True) for x in (difference.low, difference.high))
    word = {1: "better", -1: "worse", 0: "no difference shown"}[_sign(metric, difference)]
    return f"{text} (95 % interval {low} to {high}, {difference.n} seeds): {word}."


def _named(arm: str) -> str:
    return arm_title(arm) if parse_arm(arm).strategy == "none" else f"the {arm_title(arm)}"


def _conclusion(
    judged: list[Metric], ours: str, others: list[str], outcome: dict[tuple[str, str], int]
) -> str:
    parts = []
    plain = baseline(ours)
    for metric in judged:
        name = {"chosen_accuracy": "test accuracy", "last_test_loss": "test loss"}[metric.name]
        signs = {other: outcome.get((metric.name, other), 0) for other in others}
        masks = [other for other in others if other != plain]
        unbeaten = [_named(c) for c in masks if signs[c] < 1]
        worse = [_named(c) for c in masks if signs[c] < 0]
        if signs.get(plain) == -1:
            parts.append(f"it makes {name} worse than no mask does")
        elif signs.get(plain) != 1:
            parts.append(f"it is not shown to change {name} against no mask")
        elif worse:
            parts.append(
                f"it improves {name} over no mask, but less than {_listed(worse)}, so the "
                "gain is not one of Fisher information"
            )
        elif unbeaten:
            parts.append(
                f"it improves {name} over no mask, but is not shown to do better than "
                f"{_listed(unbeaten)}"
            )
        elif masks:
            parts.append(f"it improves {name} over no mask and over every control run here")
        else:
            parts.append(f"it improves {name} over no mask; no control was run")
    return f"Conclusion on the {arm_title(ours)} in this run: {'; '.join(parts)}."


def _listed(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def summary_table(results: Results) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Mean and standard deviation by arm and metric, as stored in `results.json`."""
    return {
        arm: {
            metric.name: vars(summarise(list(values(results, arm, metric).values())))
            for metric in available(results)
        }
        for arm in arms(results)
    }
