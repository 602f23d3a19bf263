"""A study of a training function of the user's own, with each arm and seed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from operator import index
from pathlib import Path
from typing import Any

from gradmask.errors import GradmaskWarning, OptionError
from gradmask.named import named
from gradmask.study.arms import STRATEGIES, parse_arm
from gradmask.study.config import StudyOptions
from gradmask.study.functions import name_of, run_trial, source_sum
from gradmask.study.progress import Progress
from gradmask.study.results import Results
from gradmask.study.runs import run_study
from gradmask.study.trial import Trial
from gradmask.study.workers import Work, ship_module


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
        TrialError: If runs failed; once all others are done. They are tried again next time.
    """
    function = named("train", train) if isinstance(train, str) else train
    if isinstance(arms, str) or isinstance(seeds, str):
        raise OptionError(f"arms={arms!r} and seeds={seeds!r} must be lists.")
    own = _own_arms(arms) if isinstance(arms, Mapping) else {}
    plain: dict[str, Any] = dict(options)
    for key in ("judge", "front"):
        if key in plain:
            plain[key] = (plain[key],) if isinstance(plain[key], str) else tuple(plain[key])
    for key in ("sweep", "options"):
        if key in plain:
            plain[key] = {k: _plain(f"{key} {k}", v) for k, v in plain[key].items()}
    try:
        config = StudyOptions(
            train=train if isinstance(train, str) else name_of(train),
            arms=tuple(arms),
            seeds=tuple(map(index, seeds)),
            output=Path(output).expanduser(),
            **plain,
        )
    except TypeError as error:
        raise OptionError(f"compare(): {error}".replace("StudyOptions.__init__() ", "")) from error
    for arm in config.arms:
        found = parse_arm(arm, own=own)
        if found.strategy == "sam":
            raise OptionError("Arm 'sam' is one of `gradmask run`: make it an arm of your own.")
        if both := found.others.keys() & config.sweep.keys():
            raise OptionError(f"Arm {arm!r} and the sweep both set {min(both)}: leave one out.")
        if ":" in found.strategy:
            own[found.strategy] = named("arm", found.strategy)
    source = source_sum(function)
    if config.scheduler is not None:
        ship_module(function)

    def begin(config: StudyOptions, results: Results) -> Work:
        if any(run.get("source", source) != source for run in results["runs"]):
            warnings.warn(
                f"{config.train}, its file or its arguments have changed since the first runs in "
                f"{config.output}: runs of different code are not comparable. Choose another "
                "output to be sure.",
                GradmaskWarning,
                stacklevel=2,
            )
        return partial(run_trial, function, config.options, own, source)

    return run_study(config, begin, progress=progress, own=own)


def _own_arms(arms: Mapping[str, Callable[..., Any] | None]) -> dict[str, Callable[..., Any]]:
    """The user's own arms by name, without the options that follow it."""
    own: dict[str, Callable[..., Any]] = {}
    for arm, function in arms.items():
        name = arm.partition(":")[0]
        if function is None:
            continue
        if name in STRATEGIES:
            raise OptionError(f"Arm {arm!r}: {name!r} is a built-in arm: give yours another name.")
        if own.setdefault(name, function) != function:
            raise OptionError(f"Arm {arm!r}: {name!r} has another function: give it another name.")
    return own


def _plain(name: str, value: Any) -> Any:
    """A value as files keep it: numbers of NumPy and tensors as Python's."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple | range):
        return [_plain(name, one) for one in value]
    if not isinstance(value, int | float | str | bool | dict | None):
        raise OptionError(f"{name}={value!r} must be a number, a text or a list of these.")
    return value
