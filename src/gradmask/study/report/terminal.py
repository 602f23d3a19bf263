"""What the terminal shows of a study: the table of means, the answers, the conclusions."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradmask.study.arms import arm_title
from gradmask.study.metrics import Metric, metrics_of
from gradmask.study.report.fronts import chosen_words
from gradmask.study.report.tables import best_arm, mean_of
from gradmask.study.statistics import Results, arms, is_swept
from gradmask.study.verdicts import Verdict, conclusions, correction, remarks, verdicts

_ARM_WIDTH = 34  # of the column of arms where room is short; longer titles take more lines


def print_summary(
    results: Results, console: Console, conclusion: Sequence[str] = (), *, judged: bool = True
) -> None:
    """Print the table of means, what it answers, and the conclusions.

    Args:
        results: Contents of `results.json`.
        console: Where to print.
        conclusion: What it shows (default: on each arm that is no control, what it is better than).
        judged: Whether the arms are compared: not if their runs have not learnt.
    """
    metrics = list(metrics_of(results).shown)
    least = _least_important_first(results, metrics)
    left_out: list[Metric] = []
    table = _means(results, metrics)
    unlimited = console.options.update(width=10_000)
    while least[1:] and console.measure(table, options=unlimited).maximum > console.width:
        left_out.append(least.pop(0))
        table = _means(results, [m for m in metrics if m not in left_out])
    console.print(table)
    if left_out:
        titles = "; ".join(metric.heading.removesuffix(" (%)") for metric in left_out)
        console.print(Text(f"Left out on this narrow terminal: {titles}.", style="dim"))
    found = verdicts(results) if judged else []
    for arm, metric in dict.fromkeys((v.arm, v.metric) for v in found):
        console.print(_answers([v for v in found if (v.arm, v.metric) == (arm, metric)]))
        console.print()
    if found:
        console.print(Text(correction(results), style="dim"))
    for sentence in remarks(results):
        console.print(Text(sentence))
    for sentence in conclusion or conclusions(results):
        console.print(Text(sentence, style="bold"))


def _least_important_first(results: Results, metrics: Sequence[Metric]) -> list[Metric]:
    """What the metric itself chose, then the training set, and last what is judged."""
    judged = metrics_of(results).judged

    def importance(metric: Metric) -> tuple[bool, bool, bool]:
        return (metric in judged, metric.at != "best", not metric.key.startswith("train_"))

    return sorted(metrics, key=importance)


def _means(results: Results, metrics: Sequence[Metric]) -> Table:
    table = Table(
        title="Mean ± standard deviation over seeds, at the epochs named", title_justify="left"
    )
    table.add_column("arm", max_width=_ARM_WIDTH, overflow="fold")
    if swept := is_swept(results):
        table.add_column("chosen", max_width=_ARM_WIDTH, overflow="fold")
    for metric in metrics:
        unit = " (%)" if metric.percent else ""
        title = metric.title.replace(" ", "\n")
        table.add_column(Text(f"{title}\n{metric.at}{unit}"), justify="right", no_wrap=True)
    best = {metric: best_arm(results, metric) for metric in metrics}
    for arm in arms(results):
        cells = [
            Text(mean_of(results, arm, m).show(m.show), style="bold" if best[m] == arm else "")
            for m in metrics
        ]
        chosen = [Text(chosen_words(results, arm))] if swept else []
        table.add_row(Text(arm_title(arm)), *chosen, *cells)
    return table


def _answers(found: Sequence[Verdict]) -> Table:
    metric = found[0].metric
    unit = ", in points" if metric.percent else ""
    title = Text(f"{arm_title(found[0].arm)}: {metric.title} of the {metric.at} epoch{unit}")
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("\nis it better than", overflow="fold", min_width=16)
    table.add_column("\nanswer", overflow="fold")
    for name in ("difference\n(95 % interval)", "p\n(corrected)", "least\neffect"):
        table.add_column(name, justify="right", no_wrap=True)
    for verdict in found:
        difference = verdict.difference
        question = verdict.question.removeprefix("better than ").removesuffix("?")
        cells = [question, verdict.answer]
        if difference is not None:
            low, high = difference.low, difference.high
            cells.append(metric.show(difference.mean, signed=True))
            if low is not None and high is not None:
                cells[-1] += (
                    f" ({metric.show(low, signed=True)} to {metric.show(high, signed=True)})"
                )
            if difference.corrected is not None:
                cells.append(f"{_short(difference.p or 0.0)} ({_short(difference.corrected)})")
                least = difference.detectable
                cells.append("" if least is None else metric.show(least))
        table.add_row(*map(Text, cells))
    return table


def _short(p: float) -> str:
    return f"{p:.2g}" if p >= 0.001 else "<0.001"
