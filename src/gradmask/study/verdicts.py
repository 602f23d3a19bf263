"""What the runs of a study answer, in words: is an arm better than each of its controls?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gradmask.study.arms import MASKS, arm_title, controls, read_arm
from gradmask.study.metrics import Metric, metrics_of, unused
from gradmask.study.statistics import (
    LEVEL,
    POWER,
    Difference,
    Results,
    arms,
    corrected,
    divergences,
    paired_difference,
    values,
)

# The question that each kind of control answers.
QUESTIONS = {
    "none": "better than no mask?",
    "slow": "better than training as slow?",
    "slow_matched": "better than training every tensor as slow?",
    "random": "better than a random mask of the same size?",
    "random_matched": "better than a random mask of the same size in every tensor?",
    "inverse": "better than a mask of the least information?",
    "early": "better than stopping early?",
}


@dataclass(frozen=True)
class Verdict:
    """One arm against one control, in one metric.

    Attributes:
        metric: The metric.
        arm: The arm that is judged.
        control: The other one.
        difference: Arm less control, corrected for the number of verdicts; None if they have no
            seed in common.
        missing: Seeds that one of the two was not run with.
    """

    metric: Metric
    arm: str
    control: str
    difference: Difference | None
    missing: tuple[int, ...] = ()

    @property
    def outcome(self) -> int:
        """1 if better beyond doubt, -1 if worse, 0 if neither is shown."""
        if self.missing or self.difference is None or not self.difference.shown:
            return 0
        return 1 if (self.difference.mean > 0) == self.metric.higher_is_better else -1

    @property
    def question(self) -> str:
        """What it answers."""
        return QUESTIONS.get(read_arm(self.control).strategy, f"better than {self.control}?")

    @property
    def answer(self) -> str:
        """The answer in few words."""
        if self.missing:
            return "not compared: not the same seeds"
        if self.difference is None:
            return "unknown: no seed in common"
        if self.difference.low is None:
            return f"not shown: {'one seed' if self.difference.n == 1 else 'no spread over seeds'}"
        return {1: "yes", -1: "no, worse", 0: "not shown"}[self.outcome]


def verdicts(results: Results) -> list[Verdict]:
    """Compare each arm that is no control with each of its controls.

    All comparisons of a study are corrected for together, by Holm's method.

    Args:
        results: Contents of `results.json`.

    Returns:
        By arm, metric and control.
    """
    present, judged = arms(results), metrics_of(results).judged
    pairs = [
        (metric, arm, control)
        for arm in present
        if read_arm(arm).is_method
        for metric in judged
        for control in controls(arm, present)
    ]
    used = {(arm, metric) for metric, *both in pairs for arm in both}
    of = {(arm, metric): values(results, arm, metric) for arm, metric in used}
    found = [paired_difference(of[arm, m], of[control, m]) for m, arm, control in pairs]
    run = {arm: {r["seed"] for r in results["runs"] if r["arm"] == arm} for arm in present}
    missing = [tuple(sorted(run[arm] ^ run[control])) for _, arm, control in pairs]
    # What is not compared is not tested either, and must not cost the others their level.
    tested = corrected([None if gone else d for d, gone in zip(found, missing, strict=True)])
    return [
        Verdict(*pair, one or difference, gone)
        for pair, one, difference, gone in zip(pairs, tested, found, missing, strict=True)
    ]


def conclusions(results: Results) -> list[str]:
    """Say of each arm that is no control, in one sentence, what it is shown to be better than.

    Args:
        results: Contents of `results.json`.

    Returns:
        One conclusion for each of these arms, or why there is none.
    """
    found = verdicts(results)
    sentences = []
    for arm in dict.fromkeys(verdict.arm for verdict in found):
        of_arm = [v for v in found if v.arm == arm]
        if not any(values(results, arm, v.metric) for v in of_arm):
            sentences.append(f"Conclusion on {named(arm)} in this run: it diverged.")
            continue
        parts = [
            _conclude([v for v in of_arm if v.metric == metric])
            for metric in dict.fromkeys(v.metric for v in of_arm)
        ]
        sentences.append(f"Conclusion on {named(arm)} in this run: {'; '.join(parts)}.")
    if not sentences:
        return ["Nothing to conclude: an arm with a mask and one of its controls are both needed."]
    return sentences


def _conclude(of_arm: list[Verdict]) -> str:
    """One metric: against no mask first, then what else would explain a gain."""
    name = of_arm[0].metric.title
    plain = [v for v in of_arm if read_arm(v.control).strategy == "none"]
    rest = [v for v in of_arm if v not in plain]
    if any(v.outcome < 0 for v in plain):
        return f"it makes {name} worse than no mask does"
    if not all(v.outcome > 0 for v in plain):
        return f"it is not shown to change {name} against no mask"
    better, unbeaten, worse = (
        [named(v.control) for v in rest if v.outcome == outcome] for outcome in (1, 0, -1)
    )
    if not plain:
        if worse:
            return f"in {name} it is worse than {listed(worse)}"
        if unbeaten:
            return f"in {name} it is not shown to do better than {listed(unbeaten)}"
        return f"in {name} it is better than {listed(better)}"
    gain = f"it improves {name} over no mask"
    if worse:
        return f"{gain}, but less than {listed(worse)}"
    if unbeaten:
        return f"{gain}, but is not shown to do better than {listed(unbeaten)}"
    return f"{gain} and over every control run here" if rest else f"{gain}; no control was run"


def unasked(results: Results) -> list[str]:
    """The main questions that no verdict of a study answers, as its controls were not run."""
    asked = {read_arm(v.control).strategy for v in verdicts(results)}
    kinds = (("none",), ("slow", "slow_matched"), ("random", "random_matched"), ("early",))
    return [QUESTIONS[kind[0]] for kind in kinds if asked and not asked & set(kind)]


def remarks(results: Results) -> list[str]:
    """What is left out of the comparisons, and why: runs that diverged, tests that some lack."""
    return [*divergences(results), *unused(results)]


def correction(results: Results) -> str:
    """Say in one sentence how the verdicts are tested."""
    found = [v.difference for v in verdicts(results)]
    number = sum(d is not None and d.corrected is not None for d in found)
    return (
        f"Student's t over paired seeds; shown is what is below {LEVEL:g} after Holm's correction "
        f"for all {number} comparisons; intervals and p are before it. The least effect is what "
        f"so many seeds, spread like these, show in {POWER:.0%} of such studies."
    )


def named(arm: str) -> str:
    """An arm in a sentence."""
    strategy = read_arm(arm).strategy
    masked = strategy in (*MASKS, "fixed")
    return f"the {arm_title(arm)}" if masked else arm_title(arm)


def listed(names: Iterable[str]) -> str:
    """Names in a sentence."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
