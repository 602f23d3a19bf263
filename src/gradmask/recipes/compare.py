"""`gradmask run`: the comparison of arms on image classification."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gradmask import fisher_diagonal
from gradmask.errors import GradmaskError, OptionError, StateError
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.batches import Batches
from gradmask.recipes.data.images import ImageData, load_images
from gradmask.recipes.data.stored import StoredImages
from gradmask.recipes.data.transforms import Normalize, transform_of
from gradmask.recipes.identity import check_data, data_sum
from gradmask.recipes.results import check_comparison
from gradmask.recipes.training.components import (
    check_model,
    check_together,
    new_model,
    resolve_device,
)
from gradmask.recipes.training.run import train_run
from gradmask.recipes.training.start import weights_sum
from gradmask.study import Diverged
from gradmask.study.budget import EpochBudget
from gradmask.study.folder import RESULTS_FILE
from gradmask.study.progress import Progress
from gradmask.study.results import Results, Row
from gradmask.study.runs import run_study
from gradmask.study.spec import Spec
from gradmask.study.workers import Work
from gradmask.study.world import current_world


def run_comparison(config: Comparison, progress: Progress) -> Results:
    """Train every arm with every seed and write the results after each run.

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
    begin = partial(_begin, progress.console)
    return run_study(config, begin, progress=progress, check=check_comparison)


def _begin(console: Console, config: Comparison, results: Results) -> Work:
    resolve_device(config.device)
    data = load_images(config, config.seeds[0])
    earlier = results.get("data", {})
    described = _describe(data)
    check_data(earlier.get("sum"), described["sum"], config.output / RESULTS_FILE)
    _check_transform(config, data)
    start = None if config.weights is None else weights_sum(config.weights)
    if earlier.get("weights", start) != start:
        raise StateError(
            f"{config.weights} has other weights than earlier runs in {config.output} began with "
            f"(sum {start}, not {earlier['weights']}): bring them back, or choose another --output."
        )
    _check_processes(config, len(data.train_labels))
    _check_model(config, data)
    if start is not None:
        described["weights"] = start
    results |= {
        "data": described if "sum" in earlier or not results["runs"] else earlier,
        "parameters": [
            [name, p.numel()]
            for name, p in new_model(config, data, 0).named_parameters()
            if p.requires_grad
        ],
    }
    console.print(data.found, highlight=False, markup=False, soft_wrap=True)
    return partial(_train, config, described["sum"], EpochBudget(config.stop_after))


def _train(
    config: Comparison,
    images: str,
    budget: EpochBudget,
    spec: Spec,
    directory: Path,
    on_epoch: Callable[[Row], None],
) -> Row:
    """Train one run, in this process or a worker's."""
    torch.backends.cudnn.deterministic = True
    config = replace(config, **spec.values)
    data = load_images(config.for_arm(spec.arm), spec.seed)
    check_data(images, data_sum(data), config.output / RESULTS_FILE)
    try:
        run = train_run(
            config,
            data,
            spec.arm,
            spec.seed,
            directory,
            on_epoch,
            budget=budget,
            on_batch=lambda epoch, share: on_epoch({"epoch": epoch, "share": share}),
        )
    except Diverged as diverged:  # the others go on
        run = diverged.run
    return run | spec.as_row()


def _check_processes(config: Comparison, images: int) -> None:
    """Refuse what several processes cannot share, or not in this way, before training starts."""
    count = current_world().size
    smallest = images // math.ceil(images / config.batch_size)
    if smallest < count:
        raise OptionError(
            f"A batch of {smallest} images cannot be shared by {count} processes: use a "
            "larger batch_size, or fewer processes."
        )
    if count > 1 and config.jobs > 1:
        raise OptionError("jobs are runs side by side: leave it out with torchrun.")
    check_together(config, count)


def _check_transform(config: Comparison, data: ImageData) -> None:
    """Try the user's own transform on an image as training would have it."""
    transform = transform_of(config)
    if transform is not None:
        images, size = data.train_images, data.train_images.shape[-1]
        if isinstance(images, StoredImages):
            transform.check(images.whole(0), size)
        else:
            transform.check(images[0], size)


def _check_model(config: Comparison, data: ImageData) -> None:
    """Measure two images, so that a model that cannot be masked is refused before training."""
    prepare = Normalize.of(data.train_images)
    inputs, labels = next(iter(Batches(data.train_images[:2], data.train_labels[:2], prepare)))
    try:
        model = check_model(config, data, inputs)
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
    counts = data.test_labels.bincount(minlength=len(data.class_names))
    return {
        "train": len(data.train_labels),
        "validation": len(data.val_labels),
        "test": len(data.test_labels),
        "classes": len(data.class_names),
        "image": list(data.train_images.shape[1:]),
        "sum": data_sum(data),
        "class_names": [ascii(n)[1:-1] if not n.isprintable() else n for n in data.class_names],
        "test_majority": int(counts.max()) / len(data.test_labels),
    }
