"""Runs an hour: a study on several workers against one, and what a study costs a run."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from rich.table import Table
from torch import nn

from gradmask.study import Trial, compare
from gradmask.study.progress import Progress
from gradmask.study.results import Row
from gradmask.study.spec import Spec


class Work:
    """A training function of a known length: products of matrices, on the threads there are.

    Args:
        seconds: About how long a run takes, with one thread of an idle core.
        epochs: Epochs that are reported.
    """

    def __init__(self, seconds: float, epochs: int) -> None:
        self.epochs = epochs
        torch.set_num_threads(1)
        started, self.products = time.perf_counter(), 0
        while time.perf_counter() - started < 1.0:
            _product()
            self.products += 1
        self.products = max(1, int(self.products * seconds / epochs))

    def __call__(self, trial: Trial) -> None:
        """Train one run."""
        model = nn.Linear(8, 2)
        trial.mask(model, torch.optim.SGD(model.parameters(), 0.1))
        for epoch in range(self.epochs):
            for _ in range(self.products):
                _product()
            trial.report(epoch=epoch, val_accuracy=0.5, test_accuracy=0.5, test_loss=1.0)


def _product() -> None:
    matrix = torch.ones(256, 256)
    for _ in range(20):
        matrix = matrix @ matrix / 256


class Finishes(Progress):
    """Notes when runs end."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def finish(self, run: Row) -> None:
        """A run is over."""
        self.times.append(time.perf_counter())


def bench_workers(*, jobs: int = 2, runs: int = 8, seconds: float = 10.0, rounds: int = 3) -> Table:
    """Time a study of equal runs by one worker and by several, each with one thread.

    Args:
        jobs: Workers.
        runs: Runs of the study.
        seconds: About how long a run takes.
        rounds: Studies of each kind, in turn.

    Returns:
        Table of medians: runs an hour once the first have ended, as a multiple of one worker's, and
        with the start of the workers; what a run takes longer than the function alone.
    """
    work = Work(seconds, epochs=10)
    steady: dict[int, list[float]] = {1: [], jobs: []}
    whole: dict[int, list[float]] = {1: [], jobs: []}
    alone = []
    for _ in range(rounds):
        started = time.perf_counter()
        with TemporaryDirectory() as folder:
            work(Trial(Spec("none", 0), Path(folder)))
        alone.append(time.perf_counter() - started)
        for count in steady:
            finishes, started = Finishes(), time.perf_counter()
            with TemporaryDirectory() as folder:
                out, options = Path(folder) / "out", {"jobs": count, "threads": 1}
                compare(work, ["none"], range(runs), out, progress=finishes, **options)
            times = finishes.times
            whole[count].append(3600 * runs / (time.perf_counter() - started))
            steady[count].append(3600 * (runs - count) / (times[-1] - times[count - 1]))
    table = Table(title=f"{runs} runs of {median(alone):.1f} s, one thread a worker")
    for title in ("workers", "runs an hour", "÷ one worker", "with the start", "s more a run"):
        table.add_column(title, justify="right")
    for count, speeds in steady.items():
        speed, start = median(speeds), median(whole[count])
        ratio, first = speed / median(steady[1]), start / median(whole[1])
        more = f"{3600 / speed - median(alone):.3f}" if count == 1 else ""
        table.add_row(str(count), f"{speed:.0f}", f"{ratio:.2f}", f"{first:.2f}", more)
    return table
