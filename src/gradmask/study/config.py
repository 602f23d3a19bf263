"""Options of a study of a training function of the user's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from gradmask.errors import OptionError
from gradmask.study.metrics import check_metrics
from gradmask.study.options import check_counts, check_different


@dataclass(frozen=True)
class StudyOptions:
    """Options of `gradmask study`: one training function, with each arm and seed.

    Attributes:
        train: The training function, `package.module:function`.
        arms: Names of arms: `none`, `fisher:keep=0.25`, `slow:keep=0.25`, `early`, or
            `package.module:function`.
        seeds: One run per arm and seed.
        sweep: Values that every arm is run with, by name: `lr=0.003,0.01,0.03`.
        options: Options of the training function, by name.
        choose: Metric that chooses an epoch, and the values of a sweep (default: the first that is
            named `val_...`).
        judge: Metrics that verdicts rest on, such as `test_accuracy@chosen` or `test_loss@last`
            (default: the first of each direction that is named `test_...`).
        metrics: `higher` or `lower`, by the name of metrics whose names do not say it.
        front: Two metrics whose front over the sweep is drawn (default: the first two judged).
        jobs: Runs at a time, each in a process of its own with a share of the cores and a GPU.
        threads: CPU threads of each (default: an equal share of the cores).
        scheduler: Address of a dask scheduler whose workers train, in place of processes here.
        output: Folder for results.
    """

    EXTENDABLE: ClassVar = ("arms", "seeds", "sweep")
    # What chooses an epoch ends the runs of `early`.
    NOT_RESULTS: ClassVar = ("jobs", "threads", "scheduler", "output", "judge", "front")

    train: str = ""
    arms: tuple[str, ...] = ("none", "fisher", "slow", "random_matched", "early")
    seeds: tuple[int, ...] = (0, 1, 2)
    sweep: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    choose: str | None = None
    judge: tuple[str, ...] = ()
    metrics: dict[str, Any] = field(default_factory=dict)
    front: tuple[str, ...] = ()
    jobs: int = 1
    threads: int | None = None
    scheduler: str | None = None
    output: Path = Path("runs/study")

    def __post_init__(self) -> None:
        """Check every option before any work starts.

        Raises:
            OptionError: If an option's value cannot work.
        """
        check_different("arms", self.arms)
        check_different("seeds", self.seeds)
        check_counts(self, "jobs")
        if self.threads is not None and self.threads < 1:
            raise OptionError(f"threads={self.threads!r} must be at least 1, or left out.")
        check_metrics(self.choose, self.judge, self.metrics)
        if self.front and len(self.front) != 2:
            raise OptionError(f"front={list(self.front)} must be two metrics.")
        for name, values in self.sweep.items():
            if not isinstance(values, list | tuple):
                raise OptionError(f"sweep {name}={values!r} must be a list of values.")
            check_different(f"sweep {name}", values)
