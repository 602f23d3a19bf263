"""The numbers of a study as tables of a page and as CSV files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gradmask.study.arms import baseline
from gradmask.study.metrics import Metric
from gradmask.study.report.fronts import chosen_words
from gradmask.study.report.parts import Cell, Look, Table
from gradmask.study.statistics import (
    Results,
    Summary,
    arms,
    available,
    compare_arms,
    is_swept,
    summarise,
    values,
)
from gradmask.study.verdicts import Verdict, verdicts

_STYLES = {1: "good", -1: "bad", 0: "weak"}


def arm_cell(look: Look) -> Cell:
    """The title of an arm, after its colour."""
    return Cell(look.title, look.title, arm=look.arm)


def mean_of(results: Results, arm: str, metric: Metric) -> Summary:
    """Mean and standard deviation of an arm over its seeds."""
    return summarise(list(values(results, arm, metric).values()))


def best_arm(results: Results, metric: Metric) -> str | None:
    """The arm with the best mean.

    None has it in a metric of the training set, where the best may have memorised the most.
    """
    if metric.higher_is_better is None or metric.key.startswith("train_"):
        return None
    means = {arm: mean_of(results, arm, metric).mean for arm in arms(results)}
    means = {arm: value for arm, value in means.items() if not math.isnan(value)}
    pick = max if metric.higher_is_better else min
    return pick(means, key=means.__getitem__, default=None)


def means_table(studies: Mapping[str, Results], looks: Sequence[Look]) -> Table:
    """Mean ± standard deviation by arm and metric; the best mean of each study is marked."""
    metrics = {m.name: m for results in studies.values() for m in available(results)}
    rows, swept = [], any(map(is_swept, studies.values()))
    for name, results in studies.items():
        own = {metric.name: metric for metric in available(results)}
        best = {metric.name: best_arm(results, metric) for metric in own.values()}
        for look in (look for look in looks if look.arm in arms(results)):
            cells = [arm_cell(look)] if len(studies) < 2 else [Cell(name, name), arm_cell(look)]
            cells += [Cell(words := chosen_words(results, look.arm), words)] if swept else []
            seeds = max((len(values(results, look.arm, m)) for m in own.values()), default=0)
            cells.append(Cell(str(seeds), seeds))
            for key in metrics:
                if key not in own:
                    cells.append(Cell("-"))
                    continue
                summary = mean_of(results, look.arm, own[key])
                style = "best" if best[key] == look.arm else ""
                value = own[key].share * summary.mean  # sorted with those of other studies
                cells.append(Cell(summary.show(own[key].show), value, style))
            rows.append(cells)
    titles = ["arm"] if len(studies) < 2 else ["study", "arm"]
    titles += ["chosen"] if swept else []
    headings = [metric.heading for metric in metrics.values()]
    return Table("", [*titles, "seeds", *headings], rows, len(titles))


def differences_table(results: Results, looks: Sequence[Look]) -> Table | None:
    """Paired differences to no mask in every metric, with their intervals."""
    metrics, rows = available(results), []
    for look in (look for look in looks if look.arm != baseline(look.arm)):
        found = [compare_arms(results, look.arm, baseline(look.arm), m) for m in metrics]
        if not any(found):
            continue
        cells = [arm_cell(look)]
        for metric, difference in zip(metrics, found, strict=True):
            if difference is None:
                cells.append(Cell("-"))
                continue
            style = "best" if difference.shown else "weak"
            text = metric.show(difference.mean, signed=True)
            interval = _interval(metric, difference.low, difference.high)
            cells.append(Cell(text, difference.mean, style, more=interval))
        rows.append(cells)
    headings = [metric.heading.replace("(%)", "(points)") for metric in metrics]
    return Table("", ["arm", *headings], rows) if rows else None


def _interval(metric: Metric, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    return f"{metric.show(low, signed=True)} to {metric.show(high, signed=True)}"


def answers_tables(results: Results, looks: Sequence[Look]) -> list[Table]:
    """For each metric, the questions that the runs answer about every arm that is no control."""
    found = verdicts(results)
    by_arm = {look.arm: look for look in looks}
    columns = ("arm", "is it", "answer", "difference", "95 % interval")
    more = ("p", "p corrected", "least effect", "seeds")
    tables = []
    for metric in dict.fromkeys(v.metric for v in found):
        rows = [_answer(v, by_arm[v.arm]) for v in found if v.metric == metric]
        unit = " (points)" if metric.percent else ""
        tables.append(Table(f"{metric.words}{unit}", (*columns, *more), rows, 3))
    return tables


def _answer(verdict: Verdict, look: Look) -> list[Cell]:
    metric, difference = verdict.metric, verdict.difference
    words = [
        arm_cell(look),
        Cell(verdict.question, verdict.question),
        Cell(verdict.answer, verdict.answer, _STYLES[verdict.outcome]),
    ]
    if difference is None:
        return [*words, *[Cell("-")] * 6]

    def number(value: float | None, text: str) -> Cell:
        return Cell("-") if value is None else Cell(text, value)

    return [
        *words,
        Cell(metric.show(difference.mean, signed=True), difference.mean),
        number(difference.low, _interval(metric, difference.low, difference.high)),
        number(difference.p, f"{difference.p:.2g}" if difference.p is not None else ""),
        number(
            difference.corrected,
            f"{difference.corrected:.2g}" if difference.corrected is not None else "",
        ),
        number(difference.detectable, metric.show(difference.detectable or 0.0)),
        Cell(str(difference.n), difference.n),
    ]


def to_csv(results: Results) -> dict[str, str]:
    """CSV sources of what was measured, and of what it shows.

    Args:
        results: Contents of `results.json`.

    Returns:
        `{name: source}`: `epochs`, `means`, `verdicts`, and `influence` if it was monitored.
    """
    tables = {"epochs": _runs(results, "epochs"), "means": _means(results)}
    tables["verdicts"] = [_verdict(verdict) for verdict in verdicts(results)]
    tables["influence"] = _runs(results, "influence")
    return {name: _csv(rows) for name, rows in tables.items() if rows}


def _runs(results: Results, key: str) -> list[dict[str, Any]]:
    return [
        {"arm": run["arm"], "seed": run["seed"], **run.get("values", {})}
        | {name: value for name, value in row.items() if isinstance(value, int | float)}
        for run in results["runs"]
        for row in run.get(key, ())
    ]


def _means(results: Results) -> list[dict[str, Any]]:
    return [
        {"arm": arm, "metric": m.key, "at": m.at} | vars(mean_of(results, arm, m))
        for arm in arms(results)
        for m in available(results)
    ]


def _verdict(verdict: Verdict) -> dict[str, Any]:
    names = {"arm": verdict.arm, "control": verdict.control, "metric": verdict.metric.name}
    numbers = vars(verdict.difference) if verdict.difference is not None else {}
    return names | {"answer": verdict.answer} | numbers


def _csv(rows: Iterable[Mapping[str, Any]]) -> str:
    found = list(rows)
    text = io.StringIO()
    columns = dict.fromkeys(name for row in found for name in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()
