"""The runs of a study: those that are missing are trained, and the results written after each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gradmask.errors import OptionError, TrialError
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
from gradmask.study.metrics import chosen_epoch, metrics_of
from gradmask.study.options import RunOptions, to_plain, to_yaml
from gradmask.study.progress import Progress
from gradmask.study.results import Results, Row, check_results
from gradmask.study.spec import Spec
from gradmask.study.statistics import summary_table, value_key
from gradmask.study.workers import Work, check_workers, execute
from gradmask.study.world import current_world

OPENING = "opening the output folder"


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

    Raises:
        TrialError: If runs failed; once all others are done.
    """
    world, progress = current_world(), progress or Progress()
    directories: dict[Path, Spec] = {}
    for spec in every_run(config):
        other = directories.setdefault(run_directory(config.output, spec), spec)
        if other is not spec:
            raise OptionError(f"Runs {other.title!r} and {spec.title!r} would share a folder.")
    scheduler = getattr(config, "scheduler", None)
    check_workers(config.jobs, scheduler)
    with ExitStack() as stack:
        opened = partial(open_folder, config, stack, check=check)
        config, results = world.from_main(opened, OPENING)
        work = begin(config, results)
        world.from_main(partial(begin_folder, config), OPENING)
        results["config"] = to_plain(config)
        missing = _missing(config, results)
        if missing:  # a visit that trains nothing does not change what was trained with
            results["environment"] = environment(getattr(config, "device", "auto"))
        with progress, ExitStack() as limits:
            if config.threads is not None and config.jobs == 1:
                limits.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(config.threads)
            progress.plan(missing, len(results["runs"]))
            failed = _train_missing(config, work, results, missing, progress, own)
        if world.is_main:
            save_results(config.output, results)
        if failed:
            raise TrialError(
                f"{len(failed)} of {len(missing)} runs failed (the traceback of each is in its "
                f"folder in {config.output / 'runs'}); the others are kept, and the same command "
                f"tries these again. {'; '.join(failed)}"
            )
    return results


def _train_missing(
    config: Any,
    work: Work,
    results: Results,
    missing: list[Spec],
    progress: Progress,
    own: Iterable[str],
) -> list[str]:
    """Train runs, and say which failed."""
    world, failed = current_world(), []

    def record(run: Row) -> None:
        results["runs"].append(run | {"commit": results["environment"].get("commit")})
        results["summary"] = summary_table(results)
        if world.is_main:
            save_results(config.output, results)
            # Only now: they were all there was of it.
            remove_checkpoints(run_directory(config.output, Spec.of(run)))
        progress.finish(run)

    def fail(spec: Spec, reason: str) -> None:
        failed.append(" ".join(reason.split())[:300])
        progress.fail(spec, failed[-1])

    derived = [spec for spec in missing if parse_arm(spec.arm, own).baseline in config.arms]
    derived = [spec for spec in derived if _is_early(spec, own)]
    todo = [(s, run_directory(config.output, s).absolute()) for s in missing if s not in derived]
    for spec, directory in todo:
        if has_checkpoint(directory):
            progress.resumed(spec)
    scheduler = getattr(config, "scheduler", None)
    limits = {"jobs": config.jobs, "threads": config.threads, "scheduler": scheduler}
    for spec, run in execute(work, todo, progress.epoch, **limits):
        if isinstance(run, TrialError):
            if world.size > 1:  # the others train on together
                raise run
            fail(spec, str(run))
            continue
        if _is_early(spec, own):
            run = early_stopped(run, parse_arm(spec.arm, own), config)
        record(run)
        _check_reported(config, run)  # what was trained is kept
    for spec in derived:
        arm = parse_arm(spec.arm, own)
        plain = replace(spec, arm=arm.baseline).as_row()
        base = next((run for run in results["runs"] if plain.items() <= run.items()), None)
        if base is None:
            fail(spec, f"{spec.title}: its run without a mask failed")
        else:
            record(early_stopped(base | spec.as_row(), arm, config))
    return failed


def _is_early(spec: Spec, own: Iterable[str]) -> bool:
    return parse_arm(spec.arm, own).strategy == "early"


def early_stopped(run: Row, arm: Arm, config: Any) -> Row:
    """A run without a mask as early stopping leaves it: up to the epoch that validation chooses.

    Args:
        run: The run, of all epochs.
        arm: The arm `early`; with `patience=n` training stops once validation has not become better
            for n epochs. What comes after the epoch that is chosen does not count, nor that it
            diverged.
        config: Options of the study.

    Returns:
        The run with the rows of these epochs.

    Raises:
        OptionError: If no metric of validation was reported.
    """
    if not run["epochs"]:
        return run
    whole = {name: value for name, value in run.items() if name != "diverged"}
    chooser = metrics_of({"config": to_plain(config), "runs": [whole]}).chooser
    if not chooser:
        raise OptionError(
            f"Arm {arm.name!r} needs a metric of validation: report val_accuracy or val_loss, or "
            "name another with choose."
        )
    rows, patience = run["epochs"], arm.own.get("patience", math.inf)
    for index in range(len(rows)):
        best = rows.index(chosen_epoch(rows[: index + 1], chooser))
        if rows[index]["epoch"] - rows[best]["epoch"] >= patience:
            break
    kept = rows[: best + 1]
    stopped = run | {"epochs": kept, "seconds": run["seconds"] * (index + 1) / len(rows)}
    stopped.pop("diverged", None)
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
    named += [*getattr(config, "front", ()), *getattr(config, "metrics", ())]
    swept = any(len(values) > 1 for values in (getattr(config, "sweep", None) or {}).values())
    if swept and not metrics_of({"config": to_plain(config), "runs": [run]}).chooser:
        raise OptionError(
            "The values of a sweep are chosen by validation: report val_accuracy or val_loss, or "
            "name another metric with choose."
        )
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
    if current_world().is_main:
        for key in done:  # of a process that was killed before it could remove them
            if key in keys:
                remove_checkpoints(run_directory(config.output, keys[key]))
    return [spec for key, spec in keys.items() if key not in set(done)]
