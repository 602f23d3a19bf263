"""The numbers of a run: which way each is better, at which epoch it is taken, how it is shown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gradmask.errors import OptionError, check_choice
from gradmask.study.arms import read_arm
from gradmask.study.results import Results, Row, without_diverged

Rows = list[Row]

DIRECTIONS = ("higher", "lower")
EPOCHS = ("chosen", "last", "best")
_HIGHER = (
    *("accuracy", "acc", "auc", "auroc", "auprc", "precision", "recall", "f1", "score", "bleu"),
    *("rouge", "rouge1", "rouge2", "rougel", "r2", "iou", "dice", "map", "mrr", "ndcg", "reward"),
)
_LOWER = (
    *("loss", "error", "err", "perplexity", "ppl", "nll", "mse", "mae", "rmse", "wer", "cer"),
    *("ece", "brier", "kl", "memorised", "regret"),
)
_SHARES = ("accuracy", "acc", "memorised")  # shown in percent, if they are in [0, 1] or [0, 100]
# What a run has in each epoch that is no result.
_NO_METRICS = ("epoch", "lr", "seconds", "refresh_seconds", "evaluation_seconds", "kept", "step")


Chooser = tuple[tuple[str, bool], ...]  # metrics that choose an epoch, and whether more is better


@dataclass(frozen=True)
class Metric:
    """One number of a run: a metric at an epoch.

    Attributes:
        key: Name in each epoch's row.
        at: The epoch: `last`; `chosen` on validation; `best`, chosen by the metric itself.
        higher_is_better: Direction of an improvement; None if it is not known.
        percent: Shown as a percentage.
        share: What makes shares of 1 of its values: 0.01 if percentages were reported.
        chooser: Metrics that choose an epoch, the first one first, with their directions.
    """

    key: str
    at: str
    higher_is_better: bool | None
    percent: bool
    chooser: Chooser = ()
    share: float = 1.0

    @property
    def name(self) -> str:
        """Key and epoch, as in `test_accuracy@chosen`."""
        return f"{self.key}@{self.at}"

    @property
    def title(self) -> str:
        """The metric in words, without the epoch."""
        return re.sub(r"^val\b", "validation", self.key.replace("_", " "))

    @property
    def label(self) -> str:
        """The same with a capital."""
        return self.title[:1].upper() + self.title[1:]

    @property
    def words(self) -> str:
        """Metric and epoch in words."""
        epochs = {
            "last": "of the last epoch",
            "chosen": "at the epoch chosen on validation",
            "best": "of its best epoch",
        }
        return f"{self.label} {epochs[self.at]}"

    @property
    def heading(self) -> str:
        """Metric, epoch and unit in few words."""
        return f"{self.title}, {self.at} epoch{' (%)' if self.percent else ''}"

    def of(self, rows: Rows) -> float:
        """The number of a run, from the rows of its epochs; NaN if none of them has it."""
        rows = [row for row in rows if self.key in row]
        if not rows:
            return math.nan
        if self.at == "best":
            pick = max if self.higher_is_better else min
            measured = [row[self.key] for row in rows if not math.isnan(row[self.key])]
            return float(pick(measured, default=math.nan))
        row = rows[-1] if self.at == "last" else chosen_epoch(rows, self.chooser)
        return float(row[self.key])

    @property
    def scale(self) -> float:
        """What values are multiplied by to be shown."""
        return 100.0 * self.share if self.percent else 1.0

    def show(self, value: float, signed: bool = False) -> str:
        """Write a value, as it was reported, as the tables do."""
        sign = "+" if signed else ""
        if self.percent:
            return f"{self.scale * value:{sign}.1f}"
        return f"{value:{sign}.3f}" if abs(value) < 1000 else f"{value:{sign}.4g}"


def chosen_epoch(rows: Rows, chooser: Iterable[tuple[str, bool]]) -> Row:
    """The epoch that validation chooses.

    Args:
        rows: The rows of a run's epochs.
        chooser: Metrics and whether higher is better: the best by the first, among equal ones by
            the next, then the earliest.

    Returns:
        Its row; the last one where no row has the first metric.
    """
    chooser = list(chooser)
    key = chooser[0][0] if chooser else ""
    measured = [row for row in rows if not math.isnan(row.get(key, math.nan))]

    def rank(row: Row) -> tuple[float, ...]:
        values = (row.get(key, math.nan) for key, _ in chooser)
        signed = (v if up else -v for v, (_, up) in zip(values, chooser, strict=True))
        return (*(-math.inf if math.isnan(v) else v for v in signed), -row["epoch"])

    return max(measured, key=rank) if measured else rows[-1]


def direction(key: str, given: Mapping[str, str] | None = None) -> bool | None:
    """Whether higher is better: as given, or as the metric's name says; None if it says nothing."""
    if given and key in given:
        return given[key] == "higher"
    words = re.split(r"[\W_]+", key.lower())
    for word in reversed(words):
        if word in _HIGHER or word in _LOWER:
            return word in _HIGHER
    return None


@dataclass(frozen=True)
class Metrics:
    """What the runs of a study are compared by.

    Attributes:
        shown: Columns of the tables.
        judged: What verdicts rest on.
        front: The two whose front over a sweep is drawn, or fewer.
        validation: What chooses an epoch, and the values of a sweep; None if there is nothing.
        chooser: The same, and what chooses among equal ones, with their directions.
    """

    shown: tuple[Metric, ...]
    judged: tuple[Metric, ...]
    front: tuple[Metric, ...]
    validation: Metric | None
    chooser: Chooser


def metrics_of(results: Results) -> Metrics:
    """What the runs of a study can be compared by: its options, else what the names say.

    An epoch is chosen by `choose`, or the first metric named `val_...` with a known direction. The
    verdicts rest on `judge`, or the first metric named `test_...` of which more is better, at the
    chosen epoch, and the first of which less is better, at the last. A name without an epoch means
    the chosen one, or without a metric of validation the last.

    Args:
        results: Contents of `results.json`.

    Returns:
        The metrics that every run has which did not diverge.
    """
    config = results["config"]
    given = config.get("metrics") or {}
    runs = without_diverged(results)["runs"]
    keys = _common_keys(runs)
    ways = {key: direction(key, given) for key in keys}
    chooser = _chooser(config.get("choose"), ways)

    def metric(key: str, at: str) -> Metric:
        found = [row.get(key, 0.0) for run in runs for row in run["epochs"]]
        found = [value for value in found if not math.isnan(value)]
        percent = bool(set(key.lower().split("_")) & set(_SHARES))
        percent &= all(0.0 <= value <= 100.0 for value in found)
        share = 0.01 if percent and max(found, default=0.0) > 1.0 else 1.0
        return Metric(key, at, ways[key], percent, chooser, share)

    shown = []
    for key in keys:
        if key.startswith("test_"):
            epochs = ("last", "chosen", "best") if ways[key] and chooser else ("last",)
            shown += [metric(key, at) for at in epochs]
        elif not key.startswith("val_") or not any(k.startswith("test_") for k in keys):
            shown.append(metric(key, "last"))
    shown.sort(key=lambda m: (not m.key.startswith("test_"), not m.higher_is_better))

    def named(option: str) -> list[Metric]:
        parts = [name.partition("@") for name in config.get(option) or ()]
        usual = "chosen" if chooser else "last"
        return [metric(key, at or usual) for key, _, at in parts if key in keys]

    judged = named("judge") or _judged_by_name(shown)
    shown += [m for m in judged if m not in shown]
    front = named("front") or judged[:2]
    validation = metric(chooser[0][0], "chosen") if chooser else None
    return Metrics(tuple(shown), tuple(judged), tuple(front), validation, chooser)


def unused(results: Results) -> list[str]:
    """Say which tests that were reported are not compared, and if validation is judged instead."""
    runs = without_diverged(results)["runs"]
    there = dict.fromkeys(key for run in runs for row in run["epochs"] for key in row)
    common = _common_keys(runs)
    lost = [key for key in there if key.startswith("test_") and key not in (*common, *_NO_METRICS)]
    lost = [key for key in lost if not key.endswith("_per_class")]
    sentences = [f"{key} is not in every run, so it is not compared." for key in lost]
    metrics = metrics_of(results)
    judged = [metric.key for metric in metrics.judged]
    tested = any(key.startswith("test_") for key in judged)
    if judged and not tested and judged[0] in dict(metrics.chooser):
        sentences.append(
            "No test_... metric is in every run: what is judged is validation, on which the epochs "
            "were chosen, which is too good."
        )
    return sentences


def _common_keys(runs: list[Row]) -> list[str]:
    """Metrics that every run has in some epoch, in the order of the first run.

    Of `early`, whose last epochs are cut off, only if there is nothing else.
    """
    early = {arm for arm in {run["arm"] for run in runs} if read_arm(arm).strategy == "early"}
    runs = [run for run in runs if run["arm"] not in early] or runs
    found = [
        dict.fromkeys(
            key
            for row in run["epochs"]
            for key, value in row.items()
            if isinstance(value, int | float) and key not in _NO_METRICS
        )
        for run in runs
    ]
    return [key for key in (found[0] if found else ()) if all(key in other for other in found)]


def _chooser(choose: str | None, ways: Mapping[str, bool | None]) -> Chooser:
    """The metric that chooses, then the others of validation; accuracies before losses."""
    known = {key: up for key, up in ways.items() if up is not None}
    named = [key for key in known if key.startswith("val_")]
    named.sort(key=lambda key: not known[key])
    first = [choose] if choose in known else named[:1]
    return tuple((key, known[key]) for key in dict.fromkeys([*first, *named]) if first)


def _judged_by_name(shown: list[Metric]) -> list[Metric]:
    """Neither is chosen on the test set."""
    known = [m for m in shown if m.higher_is_better is not None and m.at != "best"]
    tests = [m for m in known if m.key.startswith("test_")] or [
        m for m in known if not m.key.startswith("train_")
    ]
    up = [m for m in tests if m.higher_is_better]
    up = [m for m in up if m.at == "chosen"] or up
    down = [m for m in tests if not m.higher_is_better]
    return [*up[:1], *down[:1]]


def check_metrics(choose: str | None, judge: Iterable[str], given: Mapping[str, str]) -> None:
    """Check the options of a study that name metrics.

    Args:
        choose: The metric that chooses an epoch.
        judge: Metrics that verdicts rest on, each `name` or `name@chosen`, `@last`, `@best`.
        given: `higher` or `lower` by the name of a metric.

    Raises:
        OptionError: If an epoch or a direction is unknown, or that of a metric that is used.
    """
    for key, way in given.items():
        check_choice(f"direction of metric {key!r},", way, DIRECTIONS)
    for name in judge:
        _, at, epoch = name.partition("@")
        if at:
            check_choice(f"epoch of {name!r},", epoch, EPOCHS)
    used = [name.partition("@")[0] for name in judge] + ([choose] if choose else [])
    for key in used:
        if direction(key, given) is None:
            raise OptionError(
                f"Whether more of {key!r} is better its name does not say: give "
                f"metrics={{{key!r}: 'higher'}} or 'lower'."
            )
