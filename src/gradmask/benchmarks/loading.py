"""`gradmask bench loading`: images a second from the disk to uint8 batches."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from gradmask.benchmarks.timing import interleave, ratio
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.batches import training_batches
from gradmask.recipes.data.images import ImageData
from gradmask.recipes.data.sources import stored_source
from gradmask.recipes.data.transforms import augment
from gradmask.seeding import seeded_generator
from gradmask.study.world import ALONE


def bench_loading(
    *,
    images: int = 512,
    image_size: int = 224,
    batch_size: int = 64,
    workers: tuple[int, ...] = (0, 1, 2),
    rounds: int = 5,
) -> Table:
    """Time random crops of stored JPEGs, against torchvision's own `ImageFolder` pipeline.

    Args:
        images: JPEGs of 500 x 375 pixels to make, ImageNet's usual size.
        image_size: Size of the crops.
        batch_size: Images in a batch.
        workers: Numbers of workers; 0 decodes in the process itself.
        rounds: Times everything is timed.

    Returns:
        Table: images a second (median) and time as a multiple of torchvision's with the same
        workers (median of the rounds' ratios); last the augmentation of images in memory.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["GRADMASK_CACHE"] = str(folder / "cache")
        _photographs(folder / "photographs", images)
        tasks: dict[str, Callable[[], Any]] = {}
        for count in workers:
            ways = {"torchvision": _torchvision, "gradmask": _ours}
            for way, build in ways.items():
                task = build(folder / "photographs", image_size, batch_size, count)
                tasks[f"{way}, {count} workers"] = task
        small = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8)
        generator = torch.Generator().manual_seed(0)
        tasks["in memory, 32 x 32"] = lambda: [
            augment(small[part], generator) for part in torch.randperm(images).split(batch_size)
        ]
        seconds = interleave(tasks, rounds)
    table = Table(title=f"{images} JPEGs of 500 x 375 to random crops of {image_size}")
    for heading in ("", "images/s", "÷ torchvision"):
        table.add_column(heading, justify="left" if not heading else "right")
    for title in tasks:
        base = title.replace("gradmask", "torchvision")
        multiple = f"{ratio(seconds, title, base):.2f}" if base != title else ""
        table.add_row(title, f"{images / median(seconds[title]):,.0f}", multiple)
    return table


def _photographs(folder: Path, count: int) -> None:
    """Smooth random pictures, which compress about as well as photographs."""
    generator = seeded_generator("photographs")
    for split, some in (("train", count), ("val", 2)):
        for i in range(some):
            coarse = torch.rand(1, 3, 24, 32, generator=generator)
            noise = 0.05 * torch.randn(1, 3, 375, 500, generator=generator)
            smooth = torch.nn.functional.interpolate(coarse, (375, 500), mode="bicubic")
            image = v2.functional.to_pil_image((smooth + noise).clamp(0, 1)[0])
            path = folder / split / str(i % 2) / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=90)


def _torchvision(folder: Path, size: int, batch_size: int, workers: int) -> Callable[[], Any]:
    transform = v2.Compose(
        [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )
    data = ImageFolder(str(folder / "train"), transform)
    loader: Iterable[Any] = DataLoader(data, batch_size, shuffle=True, num_workers=workers)
    return lambda: deque(loader, maxlen=0)


def _ours(folder: Path, size: int, batch_size: int, workers: int) -> Callable[[], Any]:
    config = Comparison(data=str(folder), streaming=True, image_size=size, workers=workers)
    source = stored_source(config)
    train, test = (source.images, source.labels), (source.test_images, source.test_labels)
    data = ImageData(*train, source.labels, *test, *test, source.class_names)
    generator = torch.Generator().manual_seed(0)

    def epoch() -> None:
        parts = torch.randperm(len(source.labels)).split(batch_size)
        batches = training_batches(
            config, data, parts, generator, crops=(0,), prepare=lambda x: x, world=ALONE
        )
        deque(batches, maxlen=0)

    return epoch
