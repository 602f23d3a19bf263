"""`gradmask bench loop` and `gradmask bench processes`: what the training loop itself costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from gradmask.benchmarks.timing import interleave, ratio
from gradmask.errors import OptionError
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.batches import Batches, training_batches
from gradmask.recipes.data.images import ImageData
from gradmask.recipes.data.transforms import Normalize, augment
from gradmask.recipes.training.checkpoint import describe_run, save_run
from gradmask.recipes.training.components import (
    autocast,
    new_model,
    new_optimizer,
    resolve_device,
)
from gradmask.recipes.training.run import train_epoch
from gradmask.recipes.training.state import new_state
from gradmask.seeding import seeded_generator
from gradmask.study.log import RunLog

CLASSES = 10
FEWEST = 10 * CLASSES  # a tenth of them is held out, of each class


def bench_loop(
    model: str,
    *,
    width: int | None = None,
    batch_size: int = 128,
    steps: int = 8,
    rounds: int = 7,
    device: str = "cpu",
    variants: bool = True,
) -> Table:
    """Time epochs of our loop against a plain loop with the same network, data and augmentation.

    Args:
        model: A model of `gradmask run`.
        width: Its width.
        batch_size: Images of 32 x 32 pixels in a batch.
        steps: Batches in an epoch, that is, in a round.
        rounds: Times everything is timed.
        device: Device to measure on.
        variants: Time our loop with masks, channels last, and bf16 as well.

    Returns:
        Table: milliseconds of a step (median), and multiples of the plain loop's (median of the
        rounds' ratios).
    """
    config = Comparison(
        model=model, width=width, batch_size=batch_size, schedule="cosine", device=device
    )
    data = random_images(steps * batch_size).to(resolve_device(device))
    tasks: dict[str, Callable[[], Any]] = {"plain loop": plain_loop(config, data, rounds * steps)}
    tasks["our loop"] = our_loop(config, data, "none", rounds)
    folder = TemporaryDirectory()
    tasks["with log and checkpoint"] = our_loop(config, data, "none", rounds, Path(folder.name))
    if variants:
        tasks["with a mask"] = our_loop(config, data, "fisher", rounds)
        tasks["with a mask, scope update"] = our_loop(config, data, "fisher:scope=update", rounds)
        tasks["channels last"] = our_loop(replace(config, channels_last=True), data, "none", rounds)
        tasks["bf16"] = our_loop(replace(config, precision="bf16"), data, "none", rounds)
    with folder:
        seconds = interleave(tasks, rounds, device)
    table = Table(title=f"{model}, batch {batch_size} of 32 x 32, {device}")
    for title in ("", "step, ms", "÷ plain loop"):
        table.add_column(title, justify="left" if not title else "right")
    for name in tasks:
        milliseconds = 1e3 * median(seconds[name]) / steps
        table.add_row(name, f"{milliseconds:.1f}", f"{ratio(seconds, name, 'plain loop'):.3f}")
    return table


def random_images(count: int) -> ImageData:
    """As many random training images as asked for, 32 x 32 in colour, of ten classes."""
    generator = seeded_generator("loop")
    images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    few = images[:CLASSES], labels[:CLASSES]
    names = tuple(map(str, range(CLASSES)))
    return ImageData(images, labels, labels, *few, *few, names)


def our_loop(
    config: Comparison, data: ImageData, arm: str, epochs: int, folder: Path | None = None
) -> Callable[[], float]:
    """An epoch of the loop that `gradmask run` trains with.

    Args:
        config: Options.
        data: Images.
        arm: The arm.
        epochs: Epochs that will be timed.
        folder: Write the log and a checkpoint there after each epoch.

    Returns:
        Trains an epoch, and returns its mean loss.
    """
    config = replace(config, epochs=epochs + 1).for_arm(arm)  # one to warm up
    prepare = Normalize.of(data.train_images, config.channels_last)
    steps = len(data.train_labels) // config.batch_size
    train_set = Batches(data.train_images, data.train_labels, prepare, config.batch_size)
    run = new_state(config, data, arm, 0, train_set, steps)
    if run.mask is not None:
        part = replace(train_set, images=train_set.images[:64], labels=train_set.labels[:64])
        run.mask.refresh(part)
    batches = partial(training_batches, config, data, crops=(0,), prepare=prepare)
    precision = autocast(config.precision, data.train_labels.device)
    log = RunLog(folder) if folder else None
    described = describe_run(config, data, arm, 0)

    def epoch() -> float:
        loss = train_epoch(run, batches, len(data.train_labels), steps, precision, lambda: None)
        run.next_epoch()
        if log and folder:
            log.write({"epoch": run.epoch - 1, "train_loss": loss})
            save_run(folder, described, log.position(), run)
        return loss

    return epoch


def plain_loop(config: Comparison, data: ImageData, steps: int) -> Callable[[], float]:
    """An epoch as one would write it by hand."""
    device = data.train_labels.device
    model = new_model(config, data, 0).to(device).train()
    optimizer, schedule = new_optimizer(config, model, 2 * steps)
    images = data.train_images
    assert isinstance(images, Tensor)
    scaled = images.float() / 255
    mean = scaled.mean((0, 2, 3))[:, None, None]
    std = scaled.std((0, 2, 3))[:, None, None]
    generator = torch.Generator().manual_seed(0)

    def epoch() -> float:
        total = torch.zeros((), device=device)
        order = torch.randperm(len(images), generator=generator).to(device)
        for batch in order.split(config.batch_size):
            inputs = (augment(images[batch], generator).float() / 255 - mean) / std
            loss = F.cross_entropy(model(inputs), data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        return total.item() / (len(images) / config.batch_size)

    return epoch


def bench_processes(
    model: str,
    *,
    width: int | None = None,
    batch_size: int = 128,
    steps: int = 4,
    rounds: int = 3,
    counts: tuple[int, ...] = (1, 2),
) -> Table:
    """Time training by several processes with one thread each, which share every batch.

    Args:
        model: A model of `gradmask run`.
        width: Its width.
        batch_size: Images of 32 x 32 pixels in a batch of all processes together.
        steps: Batches in an epoch.
        rounds: Visits of each number of processes, in turn.
        counts: Numbers of processes.

    Returns:
        Table: images a second (median over visits of the median over epochs after the first), and
        as a multiple of the first row's.

    Raises:
        OptionError: If the model is unknown, or the images are too few to be held out.
    """
    if steps * batch_size < FEWEST:
        raise OptionError(f"{steps} steps of {batch_size} images: give {FEWEST} images or more.")
    new_model(Comparison(model=model, width=width), random_images(CLASSES), 0)  # or an error
    engines = [("ddp", counts[0])] + [(e, n) for n in counts[1:] for e in ("ddp", "fsdp")]
    found: dict[tuple[str, int], list[float]] = {key: [] for key in engines}
    for _ in range(rounds):
        for engine, count in engines:
            with TemporaryDirectory() as folder:
                output = Path(folder) / "out"
                data = _parquet(Path(folder) / "data", steps * batch_size)
                words = ["run", "compare", "--data", str(data), "--model", model, "--epochs", "4"]
                words += ["--batch_size", str(batch_size)]
                words += ["--arms", "none", "--seeds", "0", "--device", "cpu", "--threads", "1"]
                words += ["--validation", "0.1", "--engine", engine, "--output", str(output)]
                words += ["--width", str(width)] if width else []
                _launch(words, count, Path(folder) / "cache")
                seconds = list(_epoch_seconds(output))
                found[engine, count].append(steps * batch_size / median(seconds[1:]))
    base = median(found[engines[0]])
    table = Table(title=f"{model}, batch {batch_size} of 32 x 32, one thread a process")
    for title in ("processes", "engine", "images/s", "÷ one process"):
        table.add_column(title, justify="right")
    for (engine, count), speeds in found.items():
        speed = median(speeds)
        name = engine if count > 1 else ""
        table.add_row(str(count), name, f"{speed:.0f}", f"{speed / base:.2f}")
    return table


def _parquet(folder: Path, count: int) -> Path:
    """Random images as a data set on the disk."""
    from datasets import ClassLabel, Dataset, Features, disable_progress_bars
    from datasets import Image as ImageFeature
    from PIL import Image

    disable_progress_bars()
    folder.mkdir()
    data = random_images(count)
    features = Features({"image": ImageFeature(), "label": ClassLabel(num_classes=CLASSES)})
    for split, images, labels in (
        ("train", data.train_images, torch.arange(count) % CLASSES),
        ("test", data.test_images, torch.arange(CLASSES)),
    ):
        assert isinstance(images, Tensor)
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        rows = {"image": pictures, "label": labels.tolist()}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def _launch(words: list[str], count: int, cache: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [sys.executable, *(launch if count > 1 else []), "-m", "gradmask.cli", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GRADMASK_CACHE": str(cache)}
    subprocess.run(command, check=True, capture_output=True, env=environment)


def _epoch_seconds(output: Path) -> Iterator[float]:
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    for row in results["runs"][0]["epochs"]:
        yield row["seconds"]
