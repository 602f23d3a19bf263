"""The main job: every arm with every seed, in one folder that can be gone on with."""

from __future__ import annotations

import math
import platform
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision

import gradmask
from gradmask import fisher_diagonal
from gradmask.errors import GradmaskError, OptionError
from gradmask.experiments.config import (
    Comparison,
    to_plain,
    to_yaml,
)
from gradmask.experiments.data.batches import Batches
from gradmask.experiments.data.images import ImageData, load_images
from gradmask.experiments.data.transforms import Normalize
from gradmask.experiments.files import (
    remove_temporaries,
    write_atomically,
)
from gradmask.experiments.folder import (
    RESULTS_FILE,
    mark_folder,
    open_folder,
    run_directory,
    save_results,
)
from gradmask.experiments.identity import check_data, data_sum
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
from gradmask.experiments.training.divergence import Diverged
from gradmask.experiments.training.run import train_run

OPENING = "opening the output folder"


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
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.deterministic = True
    with ExitStack() as stack:
        config, results = processes().from_main(partial(open_folder, config, stack), OPENING)
        return _run(config, results, progress)


def _run(config: Comparison, results: Results, progress: Progress) -> Results:
    ours, budget = processes(), EpochBudget(config.stop_after)
    device = resolve_device(config.device)
    data = load_images(config, config.seeds[0])
    earlier = results.get("data", {})
    described = _describe(data)
    check_data(earlier.get("sum"), described["sum"], config.output / RESULTS_FILE)
    _check_processes(config, len(data.train_labels), ours)
    _check_model(config, data)
    ours.from_main(partial(_begin_folder, config), OPENING)
    results |= {
        "config": to_plain(config),
        "data": described if "sum" in earlier or not results["runs"] else earlier,
        "parameters": [
            [name, p.numel()]
            for name, p in new_model(config, data, 0).named_parameters()
            if p.requires_grad
        ],
    }
    missing = _missing(config, results)
    if missing:  # a visit that trains nothing does not change what was trained with
        results["environment"] = environment(device)
    with progress:
        for arm, seed in _announced(missing, config, results, progress):
            directory = run_directory(config.output, arm, seed)
            data = load_images(config.for_arm(arm), seed)
            check_data(described["sum"], data_sum(data), config.output / RESULTS_FILE)
            try:
                run = train_run(config, data, arm, seed, directory, progress.epoch, budget=budget)
            except Diverged as diverged:  # the others go on
                run = diverged.run
            results["runs"].append(run | {"commit": results["environment"]["commit"]})
            results["summary"] = summary_table(results)
            if ours.main:
                save_results(config.output, results)
                remove_checkpoints(directory)  # only now: they were all there is of the run
            progress.finish(run)
    if ours.main:
        save_results(config.output, results)
    return results


def _begin_folder(config: Comparison) -> None:
    mark_folder(config.output)
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
        "sum": data_sum(data),
    }


def _missing(config: Comparison, results: Results) -> list[tuple[str, int]]:
    """Runs still to do, seed by seed, so that every arm has results early."""
    done = {(run["arm"], run["seed"]) for run in results["runs"]}
    if processes().main:
        for arm, seed in done:  # of a process that was killed before it could remove them
            remove_checkpoints(run_directory(config.output, arm, seed))
    every = [(arm, seed) for seed in config.seeds for arm in config.arms]
    return [pair for pair in every if pair not in done]


def _announced(
    runs: list[tuple[str, int]], config: Comparison, results: Results, progress: Progress
) -> Iterator[tuple[str, int]]:
    progress.plan(runs, len(results["runs"]), config.epochs)
    for arm, seed in runs:
        progress.start(arm, seed, has_checkpoint(run_directory(config.output, arm, seed)))
        yield arm, seed
