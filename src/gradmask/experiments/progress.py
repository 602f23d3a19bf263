"""How far the work is: a bar on a terminal, a line for each run elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from gradmask.experiments.arms import arm_title


class Progress:
    """Shows the runs of a comparison.

    Args:
        console: Where to show them.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("epochs"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._runs = self._finished = self._width = 0

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def plan(self, runs: list[tuple[str, int]], done: int, epochs: int) -> None:
        """Say how much there is to do: arm and seed of each run."""
        self._runs = len(runs)
        self._width = max((len(arm_title(arm)) for arm, _ in runs), default=0)
        if done:
            self.console.print(f"{done} finished runs found; {len(runs)} to go.")
        self._task = self._bar.add_task("", total=len(runs) * epochs)

    def start(self, arm: str, seed: int, begun: bool = False) -> None:
        """A run begins, or goes on from its checkpoint."""
        if begun:
            text = f"Going on with {arm_title(arm)}, seed {seed}, from its checkpoint."
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        self._bar.update(self._task, description=f"{arm_title(arm)}, seed {seed}")

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch is over."""
        self._bar.advance(self._task)

    def finish(self, run: dict[str, Any]) -> None:
        """A run is over."""
        self._finished += 1
        if "diverged" in run:
            found = f"diverged in epoch {run['diverged']['epoch']}"
        else:
            last = run["epochs"][-1]
            found = (
                f"test accuracy {100 * last['test_accuracy']:.1f} %,  "
                f"test loss {last['test_loss']:.3f},  train loss {last['train_loss']:.3f}"
            )
        self.console.print(
            f"[{self._finished:>{len(str(self._runs))}}/{self._runs}] "
            f"{arm_title(run['arm']):<{self._width}} seed {run['seed']}:  {found}  "
            f"({run['seconds']:.1f} s)",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
