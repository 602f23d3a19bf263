"""How far the work is: bars on a terminal, a line for each run and now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from gradmask.study.metrics import metrics_of
from gradmask.study.results import Row
from gradmask.study.spec import Spec

EVERY = 10.0  # seconds between lines on work in progress, where there are no bars


class Progress:
    """Shows the runs of a study.

    Args:
        console: Where to show them (default: nowhere).
        epochs: Epochs of a run, if that is known.
    """

    def __init__(self, console: Console | None = None, epochs: int | None = None) -> None:
        self.console = console or Console(quiet=True)
        self.epochs = epochs
        self._bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._runs: dict[Spec, TaskID] = {}
        self._epochs: dict[Spec, list[int]] = {}  # told so far
        self._begun: dict[Spec, tuple[float, float]] = {}  # first told, and how far
        self._planned = self._finished = self._width = 0
        self._told = time.monotonic()

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def plan(self, runs: Sequence[Spec], done: int) -> None:
        """Say how much there is to do."""
        self._planned = len(runs)
        self._width = max((len(spec.title) for spec in runs), default=0)
        if done:
            self.console.print(f"{done} finished runs found; {len(runs)} to go.")
        self._all = self._bars.add_task(
            "all runs",
            total=len(runs) * (self.epochs or 1),
            unit="epochs" if self.epochs else "runs",
        )

    def resumed(self, spec: Spec) -> None:
        """A run goes on from its checkpoint."""
        self._print(f"Going on with {spec.title}, from its checkpoint.")

    def epoch(self, spec: Spec, row: Row) -> None:
        """An epoch of a run is over; with `share`, only that much of it."""
        if "share" in row:
            self.batch(spec, row["epoch"], row["share"])
            return
        told = self._epochs.setdefault(spec, [])
        if row["epoch"] not in told:  # before, by a worker that died
            told.append(row["epoch"])
            self._bars.advance(self._all, 1 if self.epochs else 0)
        self._show(spec)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._told >= EVERY:
            self._told = now
            of = f" of {self.epochs}" if self.epochs else ""
            numbers = numbers_of({**spec.as_row(), "seconds": 0.0, "epochs": [row]})
            self._print(f"{spec.title}: epoch {row['epoch']}{of}:  {numbers}")

    def batch(self, spec: Spec, epoch: int, share: float) -> None:
        """A run is at this share of an epoch, counted from 1; told now and then."""
        now, done = time.monotonic(), epoch - 1 + share
        first = self._begun.setdefault(spec, (now, done))
        self._show(spec, share)
        if self.console.is_terminal or now - self._told < EVERY or done <= first[1]:
            return
        self._told = now
        text, left = f"{spec.title}: epoch {epoch}, {share:.0%}", ""
        if self.epochs:
            text = f"{spec.title}: epoch {epoch} of {self.epochs}, {share:.0%}"
            seconds = (now - first[0]) * (self.epochs - done) / (done - first[1])
            left = f";  about {duration(seconds)} left of this run"
        self._print(text + left)

    def finish(self, run: Row) -> None:
        """A run is over."""
        if "diverged" in run:
            found = f"diverged in epoch {run['diverged']['epoch']}"
        else:
            found = numbers_of(run)
        spec = Spec.of(run)
        self._over(spec, f"{spec.title:<{self._width}}:  {found}  ({run['seconds']:.1f} s)")

    def fail(self, spec: Spec, reason: str) -> None:
        """A run failed, as the reason says, which begins with its title."""
        self._over(spec, f"failed: {reason}")

    def _over(self, spec: Spec, text: str) -> None:
        self._finished += 1
        self._told = time.monotonic()
        if spec in self._runs:
            self._bars.remove_task(self._runs.pop(spec))
        if not self.epochs:
            self._bars.advance(self._all)
        self._print(f"[{self._finished:>{len(str(self._planned))}}/{self._planned}] {text}")

    def _show(self, spec: Spec, share: float = 0.0) -> None:
        """Move a run's bar."""
        if spec not in self._runs:
            self._runs[spec] = self._bars.add_task(spec.title, total=self.epochs, unit="epochs")
        done = len(self._epochs.get(spec, ())) + share
        self._bars.update(self._runs[spec], completed=done)

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def numbers_of(run: Row) -> str:
    """The first numbers of a run's last epoch, in words."""
    metrics = [m for m in metrics_of({"config": {}, "runs": [run]}).shown if m.at == "last"]
    return ",  ".join(
        f"{m.title} {m.show(m.of(run['epochs']))}{' %' if m.percent else ''}" for m in metrics[:3]
    )
