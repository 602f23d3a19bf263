"""What the runs of a study show: means over seeds, paired differences, corrected tests."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import fmean, mean, stdev
from typing import Any

import numpy as np
from scipy import optimize, stats

from gradmask.study.arms import arm_title
from gradmask.study.metrics import Chooser, Metric, chosen_epoch, metrics_of
from gradmask.study.results import Results as Results
from gradmask.study.results import Row, diverged_at, values_of

LEVEL = 0.05
POWER = 0.8


@dataclass(frozen=True)
class Summary:
    """Mean ± standard deviation (n - 1) over seeds; `std` is None for one seed.

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
    """Mean of paired differences with its 95 % t-interval.

    There is no interval for one seed, and for several that differ by the same number: as rare
    as that is, it says nothing of the spread.

    Attributes:
        mean: Mean over seeds.
        low: Lower end of the interval, not corrected for the number of comparisons.
        high: Its upper end.
        n: Number of seeds.
        p: Two-sided p-value of Student's paired t-test.
        corrected: The same corrected for the number of comparisons (Holm).
        detectable: The least difference that so many seeds, spread like these, show in 80 % of
            such studies, at the level of the first of Holm's steps.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    p: float | None = None
    corrected: float | None = None
    detectable: float | None = None

    @property
    def shown(self) -> bool:
        """Whether it is shown not to be zero; corrected for the number of comparisons, if it is."""
        if self.corrected is not None:
            return self.corrected < LEVEL
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def arms(results: Results) -> list[str]:
    """Arms that have runs, in the order they have there: that of the options."""
    return list(dict.fromkeys(run["arm"] for run in results["runs"]))


def available(results: Results) -> list[Metric]:
    """Metrics that every run of the results has that did not diverge."""
    return list(metrics_of(results).shown)


def is_swept(results: Results) -> bool:
    """Whether arms were run with several values."""
    return len({value_key(run) for run in results["runs"]}) > 1


def value_key(run: Row) -> str:
    """A sweep's values as one text, by which runs are told apart."""
    return json.dumps(values_of(run), sort_keys=True)


def best_runs(results: Results, arm: str, chooser: Chooser | None = None) -> dict[int, Row]:
    """The run of each seed; of a sweep that at the values which validation chooses.

    The values are chosen for each seed by the mean validation metric of the OTHER seeds, so that no
    seed is judged at values that it has chosen itself; with one seed by its own.

    Args:
        results: Contents of `results.json`.
        arm: The arm.
        chooser: What chooses, if `metrics_of` has said so.

    Returns:
        Runs that did not diverge, by seed.
    """
    every = [run for run in results["runs"] if run["arm"] == arm]
    runs = {(value_key(run), run["seed"]): run for run in every if diverged_at(run) is None}
    tried = list(dict.fromkeys(value_key(run) for run in every))
    seeds = list(dict.fromkeys(run["seed"] for run in every))
    if len(tried) <= 1:
        return {seed: run for (_, seed), run in runs.items()}
    chooser = metrics_of(results).chooser if chooser is None else chooser

    def scores(value: str, seed: int) -> list[float]:
        run = runs.get((value, seed))
        row = chosen_epoch(run["epochs"], chooser) if run is not None else {}
        found = [float(row.get(key, math.nan)) * (1 if up else -1) for key, up in chooser]
        return [-math.inf if math.isnan(number) else number for number in found]

    of_each = {(value, seed): scores(value, seed) for value in tried for seed in seeds}

    def rank(value: str, seeds: list[int]) -> list[float]:
        return [fmean(numbers) for numbers in zip(*(of_each[value, s] for s in seeds), strict=True)]

    found = {}
    for seed in seeds:
        others = [s for s in seeds if s != seed] or [seed]
        best = max(tried, key=partial(rank, seeds=others))
        if (best, seed) in runs:
            found[seed] = runs[best, seed]
    return found


def values(results: Results, arm: str, metric: Metric) -> dict[int, float]:
    """The metric of every run of an arm that did not diverge, by seed; of a sweep the best runs."""
    return _values(best_runs(results, arm, metric.chooser), metric)


def _values(runs: Mapping[int, Row], metric: Metric) -> dict[int, float]:
    found = {seed: metric.of(run["epochs"]) for seed, run in runs.items()}
    return {seed: value for seed, value in found.items() if math.isfinite(value)}


def divergences(results: Results) -> list[str]:
    """Say of each arm which of its runs diverged; they are in no mean, difference or figure."""
    sentences = []
    for arm in arms(results):
        runs = [run for run in results["runs"] if run["arm"] == arm]
        found = {_seed_and_values(run): diverged_at(run) for run in runs}
        title = arm_title(arm)
        sentences += left_out(
            f"{title[0].upper()}{title[1:]}", found, "means, differences and figures"
        )
    return sentences


def _seed_and_values(run: Row) -> str:
    return ", ".join([str(run["seed"]), *(f"{k} {v}" for k, v in values_of(run).items())])


def left_out(title: str, epochs: Mapping[Any, int | None], where: str) -> list[str]:
    """A sentence on the runs of one kind that diverged, if any did.

    Args:
        title: What they are runs of.
        epochs: When each of them diverged, or None, by seed.
        where: What they are left out of.
    """
    gone = [f"seed {seed} in epoch {at}" for seed, at in epochs.items() if at is not None]
    told = f"{title}: {len(gone)} of {len(epochs)} runs diverged, left out of all {where}"
    return [f"{told}: {', '.join(gone)}."] if gone else []


def summarise(numbers: Sequence[float]) -> Summary:
    """Mean and standard deviation.

    Args:
        numbers: One number per seed.

    Returns:
        The summary.
    """
    std = stdev(numbers) if len(numbers) > 1 else None
    return Summary(mean(numbers) if numbers else math.nan, std, len(numbers))


def paired_difference(first: dict[int, float], second: dict[int, float]) -> Difference | None:
    """Mean of `first - second` over the seeds both have, with a 95 % t-interval.

    Args:
        first: Number by seed.
        second: Number by seed.

    Returns:
        The difference, or None without a common seed.
    """
    differences = [first[seed] - second[seed] for seed in first if seed in second]
    if not differences:
        return None
    summary = summarise(differences)
    if summary.std is None or (summary.mean and not summary.std):  # no spread to test by
        return Difference(summary.mean, None, None, summary.n)
    error = summary.std / math.sqrt(summary.n)
    half = float(stats.t.ppf(1 - LEVEL / 2, summary.n - 1)) * error
    p = 2 * float(stats.t.sf(abs(summary.mean) / error, summary.n - 1)) if error else 1.0
    low, high = summary.mean - half, summary.mean + half
    found = Difference(summary.mean, low, high, summary.n, p)
    return replace(found, detectable=_detectable(found, 1))


def corrected(differences: Sequence[Difference | None]) -> list[Difference | None]:
    """Correct differences for their number by Holm's method.

    Args:
        differences: All that are tested together; those without a p-value stay as they are.

    Returns:
        The same with `corrected` and `detectable`, in their order.
    """
    tested = sorted(
        (d.p, index) for index, d in enumerate(differences) if d is not None and d.p is not None
    )
    found, least = list(differences), 0.0
    for rank, (p, index) in enumerate(tested):
        least = max(least, min(1.0, (len(tested) - rank) * p))
        difference = found[index]
        assert difference is not None
        detectable = _detectable(difference, len(tested))
        found[index] = replace(difference, corrected=least, detectable=detectable)
    return found


def _detectable(difference: Difference, comparisons: int) -> float | None:
    if difference.low is None or difference.high is None or difference.low == difference.high:
        return None  # without a spread nothing is known of it
    freedom = difference.n - 1
    error = (difference.high - difference.low) / 2 / float(stats.t.ppf(1 - LEVEL / 2, freedom))
    return error * detectable_errors(freedom, comparisons)


@cache
def detectable_errors(freedom: int, comparisons: int = 1) -> float:
    """The difference, in standard errors, that a t-test shows in 80 % of such studies.

    δ of P(|Z + δ| > c · s) = 0.8, with s² = χ²/ν over midpoints of its distribution, since SciPy's
    noncentral t is NaN far out.

    Args:
        freedom: Degrees of freedom ν.
        comparisons: Tests among which it is the first of Holm's steps: c is of level 0.05 / number.
    """
    critical = float(stats.t.ppf(1 - LEVEL / comparisons / 2, freedom))
    spread = np.sqrt(stats.chi2.ppf((np.arange(4000) + 0.5) / 4000, freedom) / freedom)

    def lacking(shift: float) -> float:
        shown = stats.norm.cdf(shift - critical * spread) + stats.norm.cdf(
            -shift - critical * spread
        )
        return float(shown.mean()) - POWER

    return float(optimize.brentq(lacking, 0.0, 3 * critical + 10))


def compare_arms(results: Results, arm: str, other: str, metric: Metric) -> Difference | None:
    """Paired difference of two arms of a study, None if they share no seed."""
    return paired_difference(values(results, arm, metric), values(results, other, metric))


def summary_table(results: Results) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Mean and standard deviation by arm and metric, as stored in `results.json`."""
    metrics = metrics_of(results)
    best = {arm: best_runs(results, arm, metrics.chooser) for arm in arms(results)}
    return {
        arm: {m.name: vars(summarise(list(_values(runs, m).values()))) for m in metrics.shown}
        for arm, runs in best.items()
    }
