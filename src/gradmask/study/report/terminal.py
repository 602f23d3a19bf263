"""What the terminal shows of a study: the table of means, the answers, the conclusions."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradmask.study.arms import arm_title
from gradmask.study.metrics import Metric, metrics_of
from gradmask.study.report.tables import best_arm, mean_of
from gradmask.study.statistics import Results, arms, divergences
from gradmask.study.verdicts import Verdict, conclusions, verdicts

_ARM_WIDTH = 34  # of the column of arms where room is short; longer titles take more lines


def print_summary(results: Results, console: Console) -> None:
    """Print the table of means, what it answers, and the conclusions.

    Args:
        results: Contents of `results.json`.
        console: Where to print.
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
    found = verdicts(results)
    for arm, metric in dict.fromkeys((v.arm, v.metric) for v in found):
        console.print(_answers([v for v in found if (v.arm, v.metric) == (arm, metric)]))
    for sentence in divergences(results):
        console.print(Text(sentence))
    for sentence in conclusions(results):
        console.print(Text(sentence, style="bold"))


def _least_important_first(results: Results, metrics: Sequence[Metric]) -> list[Metric]:
    """What is judged goes last, and what is chosen by itself or of the training set first."""
    judged = metrics_of(results).judged

    def importance(metric: Metric) -> int:
        if metric in judged:
            return 3
        if metric.at == "best" or metric.key.startswith("train_"):
            return 0 if metric.at == "best" else 1
        return 2

    return sorted(reversed(metrics), key=importance)


def _means(results: Results, metrics: Sequence[Metric]) -> Table:
    table = Table(title="Mean ± standard deviation over seeds", title_justify="left")
    table.add_column("arm", max_width=_ARM_WIDTH, overflow="fold")
    for metric in metrics:
        unit = " (%)" if metric.percent else ""
        title = Text(f"{metric.title}{unit}\n{metric.at} epoch")
        table.add_column(title, justify="right", no_wrap=True)
    best = {metric: best_arm(results, metric) for metric in metrics}
    for arm in arms(results):
        cells = [
            Text(mean_of(results, arm, m).show(m.show), style="bold" if best[m] == arm else "")
            for m in metrics
        ]
        table.add_row(Text(arm_title(arm)), *cells)
    return table


def _answers(found: Sequence[Verdict]) -> Table:
    metric = found[0].metric
    unit = ", points" if metric.percent else ""
    title = Text(f"Is the {arm_title(found[0].arm)} ({metric.words}{unit})", style="italic")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("", overflow="fold")
    table.add_column("answer", overflow="fold")
    for name in ("difference", "95 % interval", "p", "corrected", "least"):
        table.add_column(name, justify="right", overflow="fold")
    for verdict in found:
        difference = verdict.difference
        words = [verdict.question, verdict.answer]
        if difference is None:
            table.add_row(*map(Text, words))
            continue
        low, high, p = difference.low, difference.high, difference.p
        numbers = [metric.show(difference.mean, signed=True)]
        if low is not None and high is not None and p is not None:
            numbers += [f"{metric.show(low, signed=True)} to {metric.show(high, signed=True)}"]
            corrected, least = difference.corrected, difference.detectable
            numbers += [f"{p:.2g}", "" if corrected is None else f"{corrected:.2g}"]
            numbers += ["" if least is None else metric.show(least)]
        table.add_row(*map(Text, [*words, *numbers]))
    return table
