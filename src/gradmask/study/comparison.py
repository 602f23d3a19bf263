"""The comparison: every arm with every seed, in one folder that can be gone on with."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from gradmask.errors import GradmaskWarning, OptionError
from gradmask.study.arms import Arm, parse_arm
from gradmask.study.environment import environment
from gradmask.study.files import remove_temporaries, write_atomically
from gradmask.study.folder import (
    has_checkpoint,
    mark_folder,
    open_folder,
    remove_checkpoints,
    run_directory,
    save_results,
)
from gradmask.study.metrics import check_metrics, chosen_epoch, metrics_of
from gradmask.study.options import RunOptions, to_plain, to_yaml
from gradmask.study.processes import processes
from gradmask.study.progress import Progress
from gradmask.study.results import Results, Row, check_results
from gradmask.study.spec import Spec
from gradmask.study.statistics import summary_table, value_key
from gradmask.study.trial import Trial, run_trial
from gradmask.study.workers import Work, check_workers, execute, ship_module

OPENING = "opening the output folder"


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
    NOT_RESULTS: ClassVar = (
        *("jobs", "threads", "scheduler", "output"),
        *("choose", "judge", "metrics", "front"),
    )

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
        if self.jobs < 1:
            raise OptionError(f"jobs={self.jobs!r} must be at least 1.")
        if self.threads is not None and self.threads < 1:
            raise OptionError(f"threads={self.threads!r} must be at least 1, or left out.")
        check_metrics(self.choose, self.judge, self.metrics)
        if self.front and len(self.front) != 2:
            raise OptionError(f"front={list(self.front)} must be two metrics.")
        for name, values in self.sweep.items():
            if not isinstance(values, list | tuple):
                raise OptionError(f"sweep {name}={values!r} must be a list of values.")
            check_different(f"sweep {name}", values)


def check_different(name: str, values: Sequence[Any]) -> None:
    """Check that there are values, and none twice."""
    if not values or len(set(map(repr, values))) < len(values):
        raise OptionError(f"{name}={list(values)} must be one or more different values.")


def compare(
    train: Callable[[Trial], Any] | str,
    arms: Iterable[str] | Mapping[str, Callable[..., Any] | None] = StudyOptions.arms,
    seeds: Iterable[int] = StudyOptions.seeds,
    output: str | Path = StudyOptions.output,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Results:
    """Train a function of your own with every arm and seed, and compare the arms.

    The output folder then holds `config.yaml`, `results.json` and `runs/<arm>-seed<k>/`;
    `write_report` adds the report. Runs that are there already are not done again, so that an
    interrupted study goes on, and a finished one can be given more seeds or arms.

    Args:
        train: Called with a `Trial` for each run, or its name, `package.module:function`.
        arms: Names of arms; in a mapping, names of your own have a function
            `(trial, model, optimizer, **options)` that returns a mask or None.
        seeds: One run per arm and seed.
        output: Folder for results.
        progress: Shows how far the work is (default: nothing is shown).
        options: Other options of `StudyOptions`: `sweep`, `options`, `choose`, `judge`, `metrics`,
            `jobs`, `threads`, `scheduler`.

    Returns:
        The contents of `results.json`.

    Raises:
        OptionError: If an option, or the folder, cannot be used; before training starts.
        StateError: If the folder holds another study, or a damaged one.
    """
    function, name = resolve(train)
    own = {k: f for k, f in arms.items() if f is not None} if isinstance(arms, Mapping) else {}
    plain: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list | range) else v for k, v in options.items()
    }
    if "sweep" in plain:
        sweep = plain["sweep"].items()
        plain["sweep"] = {k: list(v) if isinstance(v, range | tuple) else v for k, v in sweep}
    try:
        config = StudyOptions(
            train=name, arms=tuple(arms), seeds=tuple(seeds), output=Path(output), **plain
        )
    except TypeError as error:
        raise OptionError(f"compare(): {error}".replace("StudyOptions.__init__() ", "")) from error
    for arm in config.arms:
        found = parse_arm(arm, own=own)
        if ":" in found.strategy:
            own[found.strategy] = resolve(found.strategy)[0]
    source = {"source": source_sum(function)}
    if config.scheduler is not None:
        ship_module(function)

    def begin(config: StudyOptions, results: Results) -> Work:
        before = results.get("source")
        if results["runs"] and before not in (None, source["source"]):
            warnings.warn(
                f"The file of {config.train} has changed since the first runs in {config.output}: "
                "runs of different code are not comparable. Choose another output to be sure.",
                GradmaskWarning,
                stacklevel=2,
            )
        results |= source
        return partial(run_trial, function, config.options, own)

    return run_study(config, begin, progress=progress, own=own)


def resolve(train: Callable[..., Any] | str) -> tuple[Callable[..., Any], str]:
    """A function and its name, `package.module:function`."""
    if callable(train):
        module = getattr(train, "__module__", "") or "__main__"
        return train, f"{module}:{getattr(train, '__qualname__', type(train).__name__)}"
    module, _, attribute = train.partition(":")
    if not module or not attribute:
        raise OptionError(f"train={train!r} must be written package.module:function.")
    try:
        function = importlib.import_module(module)
        for part in attribute.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"{train!r} cannot be imported: {error}.") from error
    if not callable(function):
        raise OptionError(f"{train!r} is no function.")
    return function, train


def source_sum(function: Callable[..., Any]) -> str | None:
    """SHA-256 of the file that a function is in; None if there is none."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
        return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except (TypeError, OSError):
        return None


def run_study(
    config: Any,
    begin: Callable[[Any, Results], Work],
    *,
    progress: Progress | None = None,
    own: Iterable[str] = (),
    check: Callable[[Any], Results] = check_results,
) -> Results:
    """Train every run that is missing in the folder, and write the results after each.

    Args:
        config: Options, with `arms`, `seeds`, `output`, `jobs`, `threads`, and perhaps `sweep` and
            `scheduler`.
        begin: Called with the options and results of the folder, once it is this process's own and
            before anything is written: checks what can be checked, may add to the results, and
            returns what trains one run.
        progress: Shows how far the work is.
        own: Names of arms of the user's own.
        check: Checks results that are there already.

    Returns:
        The contents of `results.json`.
    """
    ours, progress = processes(), progress or Progress()
    scheduler = getattr(config, "scheduler", None)
    check_workers(config.jobs, scheduler)
    with ExitStack() as stack:
        opened = partial(open_folder, config, stack, check=check)
        config, results = ours.from_main(opened, OPENING)
        work = begin(config, results)
        ours.from_main(partial(begin_folder, config), OPENING)
        results["config"] = to_plain(config)
        missing = _missing(config, results)
        if missing:  # a visit that trains nothing does not change what was trained with
            results["environment"] = environment(getattr(config, "device", "auto"))
        with progress, ExitStack() as limits:
            if config.threads is not None and config.jobs == 1:
                limits.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(config.threads)
            progress.plan(missing, len(results["runs"]))
            _train_missing(config, work, results, missing, progress, own)
        if ours.main:
            save_results(config.output, results)
    return results


def _train_missing(
    config: Any,
    work: Work,
    results: Results,
    missing: list[Spec],
    progress: Progress,
    own: Iterable[str],
) -> None:
    ours = processes()

    def record(run: Row) -> None:
        results["runs"].append(run | {"commit": results["environment"].get("commit")})
        results["summary"] = summary_table(results)
        if ours.main:
            save_results(config.output, results)
            # Only now: they were all there was of it.
            remove_checkpoints(run_directory(config.output, Spec.of(run)))
        progress.finish(run)

    derived = [spec for spec in missing if parse_arm(spec.arm, own).baseline in config.arms]
    derived = [spec for spec in derived if _is_early(spec, own)]
    todo = [(s, run_directory(config.output, s)) for s in missing if s not in derived]
    for spec, directory in todo:
        if has_checkpoint(directory):
            progress.resumed(spec)
    scheduler = getattr(config, "scheduler", None)
    limits = {"jobs": config.jobs, "threads": config.threads, "scheduler": scheduler}
    for spec, run in execute(work, todo, progress.epoch, **limits):
        if "epochs" in run and _is_early(spec, own):
            run = early_stopped(run, parse_arm(spec.arm, own), config)
        _check_reported(config, run)
        record(run)
    for spec in derived:
        arm = parse_arm(spec.arm, own)
        plain = replace(spec, arm=arm.baseline).as_row()
        base = next(run for run in results["runs"] if plain.items() <= run.items())
        record(early_stopped(base | spec.as_row(), arm, config))


def _is_early(spec: Spec, own: Iterable[str]) -> bool:
    return parse_arm(spec.arm, own).strategy == "early"


def early_stopped(run: Row, arm: Arm, config: Any) -> Row:
    """A run without a mask as early stopping leaves it: up to the epoch that validation chooses.

    Args:
        run: The run, of all epochs.
        arm: The arm `early`; with `patience=n` training stops once validation has not become better
            for n epochs.
        config: Options of the study.

    Returns:
        The run with the rows of these epochs.

    Raises:
        OptionError: If no metric of validation was reported.
    """
    if "diverged" in run:
        return run
    chooser = metrics_of({"config": to_plain(config), "runs": [run]}).chooser
    if not chooser:
        raise OptionError(
            f"Arm {arm.name!r} needs a metric of validation: report val_accuracy or val_loss, or "
            "name another with choose."
        )
    rows, patience = run["epochs"], arm.own.get("patience", math.inf)
    for place in range(len(rows)):
        best = rows.index(chosen_epoch(rows[: place + 1], chooser))
        if place - best >= patience:
            break
    kept = rows[: best + 1]
    stopped = run | {"epochs": kept, "seconds": run["seconds"] * (place + 1) / len(rows)}
    if "influence" in run:
        records = run["influence"]
        stopped["influence"] = [r for r in records if r["epoch"] <= kept[-1]["epoch"]]
    return stopped


def _check_reported(config: Any, run: Row) -> None:
    """Refuse options that name a metric which no run has, as soon as that can be known."""
    if "diverged" in run:
        return
    there = {key for row in run["epochs"] for key in row}
    named = [getattr(config, "choose", None), *getattr(config, "judge", ())]
    for name in named:
        if name is not None and name.partition("@")[0] not in there:
            raise OptionError(
                f"{name!r} is not among what the training function reported: "
                f"{', '.join(sorted(there - {'epoch'}))}."
            )


def begin_folder(config: RunOptions) -> None:
    """Mark the folder as one of ours, with its options."""
    mark_folder(config.output)
    remove_temporaries(config.output)
    write_atomically(config.output / "config.yaml", to_yaml(config))


def every_run(config: Any) -> list[Spec]:
    """All runs of a study, seed by seed, so that every arm has results early."""
    sweep = getattr(config, "sweep", None) or {}
    grid = [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]
    return [
        Spec(arm, seed, values) for seed in config.seeds for values in grid for arm in config.arms
    ]


def _missing(config: Any, results: Results) -> list[Spec]:
    """Runs still to do."""
    done = [(run["arm"], run["seed"], value_key(run)) for run in results["runs"]]
    every = every_run(config)
    keys = {(s.arm, s.seed, value_key(s.as_row())): s for s in every}
    if processes().main:
        for key in done:  # of a process that was killed before it could remove them
            if key in keys:
                remove_checkpoints(run_directory(config.output, keys[key]))
    return [spec for key, spec in keys.items() if key not in set(done)]
