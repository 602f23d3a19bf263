"""The main job: every arm with every seed, in one folder that can be gone on with."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torchvision
import yaml

import gradmask
from gradmask import fisher_diagonal
from gradmask.errors import GradmaskError, OptionError, StateError
from gradmask.experiments.config import (
    EXTENDABLE,
    NOT_RESULTS,
    Comparison,
    RunOptions,
    to_plain,
    to_yaml,
)
from gradmask.experiments.data.batches import Batches
from gradmask.experiments.data.images import ImageData, load_images
from gradmask.experiments.data.transforms import Normalize
from gradmask.experiments.files import (
    is_temporary,
    remove_temporaries,
    write_atomically,
    write_json,
)
from gradmask.experiments.processes import Processes, processes
from gradmask.experiments.progress import Progress
from gradmask.experiments.reports.statistics import Results, summary_table
from gradmask.experiments.training.budget import EpochBudget
from gradmask.experiments.training.checkpoint import has_checkpoint, remove_checkpoints
from gradmask.experiments.training.components import (
    check_together,
    new_model,
    resolve_device,
)
from gradmask.experiments.training.run import train_run

RESULTS_VERSION = 1
RESULTS_FILE = "results.json"
OPENING = "opening the output folder"
Options = TypeVar("Options", bound=RunOptions)


def run_comparison(config: Comparison, progress: Progress) -> Results:
    """Train every arm with every seed and write the results after each run.

    The output folder then holds `config.yaml`, `results.json` and `runs/<arm>-seed<k>/`. Runs
    that `results.json` already holds are not done again and one that has a checkpoint goes on from
    it, so an interrupted comparison goes on and a finished one can be given more seeds or arms.

    Args:
        config: Options of the comparison.
        progress: Shows how far the work is.

    Returns:
        The contents of `results.json`.

    Raises:
        GradmaskError: If an option, the data, the model or the folder cannot be used; all of
            these are checked before training starts.
        EpochsSpent: If `stop_after` epochs were trained and there is more to do.
    """
    ours, budget = processes(), EpochBudget(config.stop_after)
    device = resolve_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.deterministic = True
    config, results = ours.from_main(partial(open_folder, config), OPENING)
    data = load_images(config, config.seeds[0])
    _check_processes(config, len(data.train_labels), ours)
    _check_model(config, data)
    ours.from_main(partial(_begin_folder, config), OPENING)
    results |= {
        "config": to_plain(config),
        "environment": environment(device),
        "data": _describe(data),
        "parameters": [
            [name, p.numel()]
            for name, p in new_model(config, data, 0).named_parameters()
            if p.requires_grad
        ],
    }
    with progress:
        for arm, seed in _missing(config, results, progress):
            directory = run_directory(config.output, arm, seed)
            data = load_images(config.for_arm(arm), seed)
            run = train_run(config, data, arm, seed, directory, progress.epoch, budget=budget)
            results["runs"].append(run)
            results["summary"] = summary_table(results)
            if ours.main:
                save_results(config.output, results)
                remove_checkpoints(directory)  # only now: they were all there is of the run
            progress.finish(run)
    if ours.main:
        save_results(config.output, results)
    return results


def _begin_folder(config: Comparison) -> None:
    config.output.mkdir(parents=True, exist_ok=True)
    remove_temporaries(config.output)
    write_atomically(config.output / "config.yaml", to_yaml(config))


def _check_processes(config: Comparison, images: int, ours: Processes) -> None:
    """Refuse what several processes cannot share, or not in this way, before training starts."""
    smallest = images // math.ceil(images / config.batch_size)
    if smallest < ours.count:
        raise OptionError(
            f"A batch of {smallest} images cannot be shared by {ours.count} processes: use a "
            "larger batch_size, or fewer processes."
        )
    check_together(config, ours.count)


def run_directory(folder: Path, arm: str, seed: int) -> Path:
    """Where the files of one run lie in the folder of a comparison."""
    return folder / "runs" / f"{arm.replace(':', '-')}-seed{seed}"


def open_folder(
    config: Options, file: str = RESULTS_FILE, extendable: tuple[str, ...] = EXTENDABLE
) -> tuple[Options, Results]:
    """Check the output folder, and read what it holds already.

    Args:
        config: Options of the comparison, or of another recipe that writes runs into a folder.
        file: Name of its results, which hold a list `runs`.
        extendable: Options that name what is run, to which a later visit may add.

    Returns:
        The options with what the folder was extended by earlier (arms and seeds), and its results
        so far. A folder without a finished run or a checkpoint has nothing to lose: it is taken
        over as if it were empty.

    Raises:
        OptionError: If the folder holds a different run, or other files.
    """
    results: Results = {"version": RESULTS_VERSION, "runs": []}
    folder = config.output
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"output={str(folder)!r} is a file: choose another --output.")
    if not folder.exists() or all(map(is_temporary, folder.iterdir())):
        return config, results
    if not (folder / "config.yaml").exists():
        raise OptionError(
            f"{folder} holds files, but no run (no config.yaml): choose another --output."
        )
    written, ours = _read_options(folder / "config.yaml"), to_plain(config)
    if (folder / file).exists():
        results = read_results(folder, file)
    begun = results["runs"] or any(map(has_checkpoint, (folder / "runs").glob("*")))
    if not begun and written.keys() == ours.keys():  # not a user's own config.yaml
        return config, results
    earlier = to_plain(type(config)()) | written  # options it does not name are younger than it
    for name, value in ours.items():
        if name not in (*extendable, *NOT_RESULTS) and earlier.get(name) != value:
            raise OptionError(
                f"{folder} holds a different run, with {name}={earlier.get(name)!r}, not "
                f"{value!r}: choose another --output, or delete it."
            )
    merged: dict[str, Any] = {
        name: tuple(dict.fromkeys([*earlier.get(name, []), *ours[name]])) for name in extendable
    }
    return replace(config, **merged), results


def _read_options(path: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        options = None
    if not isinstance(options, dict):
        raise StateError(f"{path} is damaged: choose another --output, or delete the folder.")
    return options


def read_results(folder: Path, file: str = RESULTS_FILE) -> Results:
    """Read `results.json` of a comparison.

    Args:
        folder: The comparison's output folder.
        file: Another name, of another recipe's results.

    Returns:
        Its contents.

    Raises:
        StateError: If there is none, or it is damaged or of another version.
    """
    path = folder / file
    if not path.is_file():
        raise StateError(f"No {file} in {folder}: give the --output folder of a run.")
    try:
        results: Results = json.loads(path.read_text(encoding="utf-8"))
        version = results["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise StateError(f"{path} is damaged ({error}): delete it and run again.") from error
    if version != RESULTS_VERSION:
        raise StateError(
            f"{path} is of version {version}; this gradmask reads version {RESULTS_VERSION}."
        )
    return results


def save_results(folder: Path, results: Results) -> None:
    """Write `results.json`, with its runs in the order of arms and seeds."""
    order = {arm: i for i, arm in enumerate(results["config"]["arms"])}
    results["runs"].sort(key=lambda run: (order[run["arm"]], run["seed"]))
    write_json(folder / RESULTS_FILE, results)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine that the results were measured with."""
    cuda = device.type == "cuda"
    return {
        "gradmask": gradmask.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """Commit of the source this runs from, if it is a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run([*git, "--exclude=*"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _check_model(config: Comparison, data: ImageData) -> None:
    """Measure two images, so that a model that cannot be masked is refused before training."""
    prepare = Normalize.of(data.train_images)
    inputs, labels = next(iter(Batches(data.train_images[:2], data.train_labels[:2], prepare)))
    try:
        model = new_model(config, data, config.seeds[0])
        fisher_diagonal(model, [(inputs, labels)], kind=config.fisher_kind)
    except GradmaskError:
        raise
    except (RuntimeError, AssertionError, ValueError) as error:  # most often of the image size
        size, reason = inputs.shape[-1], (str(error).splitlines() or [repr(error)])[0]
        raise OptionError(
            f"model={config.model!r} cannot run on images of {size} x {size} pixels: "
            f"{reason.rstrip('.!')}. Give another size with --image-size, or another --model."
        ) from error


def _describe(data: ImageData) -> dict[str, Any]:
    return {
        "train": len(data.train_labels),
        "validation": len(data.val_labels),
        "test": len(data.test_labels),
        "classes": len(data.class_names),
        "image": list(data.train_images.shape[1:]),
    }


def _missing(config: Comparison, results: Results, progress: Progress) -> Iterator[tuple[str, int]]:
    """Runs still to do, seed by seed, so that every arm has results early."""
    done = {(run["arm"], run["seed"]) for run in results["runs"]}
    every = [(arm, seed) for seed in config.seeds for arm in config.arms]
    missing = [pair for pair in every if pair not in done]
    progress.plan(missing, len(done), config.epochs)
    if processes().main:
        for arm, seed in done:  # of a process that was killed before it could remove them
            remove_checkpoints(run_directory(config.output, arm, seed))
    for arm, seed in missing:
        progress.start(arm, seed, has_checkpoint(run_directory(config.output, arm, seed)))
        yield arm, seed
