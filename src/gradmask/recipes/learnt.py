"""Runs that have not learnt: a comparison of them says nothing about the arms."""

from __future__ import annotations

import math

from gradmask.study.arms import read_arm
from gradmask.study.results import Results, Row, without_diverged
from gradmask.study.statistics import arms

_EXPLODED = 10  # times the loss of a network that says the same for every image
_ERRORS = 2  # standard errors of an accuracy above the majority's share


def not_learnt(results: Results) -> list[str]:
    """Name the arms whose runs have not learnt, to be said in place of a verdict.

    A run has not learnt if its test accuracy was never clearly above the share of the most frequent
    class, unless its labels are random; or if a loss of its last epoch is ten times as high as that
    of a network that knows nothing.

    Args:
        results: Contents of `results.json`.

    Returns:
        A sentence for each arm and reason; none if all is well.
    """
    data, config = results["data"], results["config"]
    share = float(data.get("test_majority", 1 / data["classes"]))
    limit = share + _ERRORS * math.sqrt(share * (1 - share) / max(1, data["test"]))
    high = _EXPLODED * math.log(max(2, data["classes"]))
    sentences = []
    for arm in arms(results):
        runs = [run for run in without_diverged(results)["runs"] if run["arm"] == arm]
        title = read_arm(arm).title
        random = read_arm(arm).options.get("labels", config.get("labels")) == "random"
        stuck = [] if random else [run for run in runs if _best(run) <= limit]
        if stuck:
            best = max(map(_best, stuck))
            sentences.append(
                f"{_who(title, stuck, runs)} not learnt: test accuracy is {100 * best:.1f} % at "
                f"best, and one answer for all images would have {100 * share:.1f} %. Check the "
                "labels; try another lr, more epochs or another model."
            )
        burst = [run for run in runs if _highest(run) > high]
        if burst:
            sentences.append(
                f"{_who(title, burst, runs)} exploded: a loss of the last epoch is "
                f"{max(map(_highest, burst)):.3g}, and that of a network that knows nothing is "
                f"{high / _EXPLODED:.2f}. Try a lower lr."
            )
    return sentences


def _who(title: str, found: list[Row], runs: list[Row]) -> str:
    some = "" if len(found) == len(runs) else f", {len(found)} of {len(runs)} runs,"
    return f"{title[0].upper()}{title[1:]}{some} has"


def _best(run: Row) -> float:
    return max(float(row.get("test_accuracy", 0.0)) for row in run["epochs"])


def _highest(run: Row) -> float:
    losses = ("train_loss", "val_loss", "test_loss")
    return max(float(run["epochs"][-1].get(name, 0.0)) for name in losses)
