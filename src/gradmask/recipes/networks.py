"""What several runs of a study begin with, made once by whoever comes first, and training on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from gradmask.errors import DataError
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.batches import Batches
from gradmask.recipes.data.images import ImageData
from gradmask.recipes.data.sources import in_memory
from gradmask.recipes.training.components import new_model
from gradmask.recipes.training.run import Row, train_run
from gradmask.recipes.training.weights import load_weights, save_weights
from gradmask.study import Diverged, Trial
from gradmask.study.files import read_json, write_atomically


def shared_folder(trial: Trial) -> Path:
    """Where the runs of a study keep what they begin with."""
    return trial.directory.parents[1] / "networks"


def trained_network(config: Comparison, data: ImageData, seed: int, path: Path) -> nn.Module:
    """Train a network without a mask, or read what another run of the study has trained.

    Args:
        config: Options of the training.
        data: The images.
        seed: Seed of the training.
        path: Where its weights are kept; processes wait for the one that trains.

    Returns:
        The network after its last epoch, on the device of the images.

    Raises:
        DataError: If training diverges.
        StateError: If the file is damaged.
    """

    def keep_last(row: Row, model: nn.Module, _: Batches) -> None:
        if row["epoch"] == config.epochs:
            save_weights(path, model.state_dict())

    def train() -> None:
        with TemporaryDirectory(dir=path.parent) as folder:
            train_run(
                config, data, "none", seed, Path(folder), observe=keep_last, checkpoints=False
            )

    try:
        _make_once(path, train)
    except Diverged as error:  # it is not this run that diverged
        raise DataError(
            f"The network that runs begin with diverges: lower lr. ({error})"
        ) from error
    return read_network(config, data, seed, path, mend="delete it; it is trained again.")


def read_network(
    config: Comparison,
    data: ImageData,
    seed: int,
    path: Path,
    expected: str | None = None,
    mend: str = "give the weights that another study of this recipe has kept.",
) -> nn.Module:
    """A network whose weights are in a file, on the device of the images.

    Args:
        config: Options of its training.
        data: The images.
        seed: Seed of its training.
        path: The file.
        expected: Their sum (default: any).
        mend: What to do if it is damaged, for the message.

    Raises:
        StateError: If the file is damaged, or of another network.
    """
    model = new_model(config, data, seed)
    load_weights(path, model, expected, mend)
    return model.to(data.train_labels.device)


def remembered(path: Path, measure: Callable[[], Any]) -> Any:
    """Plain values that several runs need: measured by the first, read by the others.

    Args:
        path: Where they are kept as JSON; processes wait for the one that measures.
        measure: Gives them.

    Raises:
        StateError: If the file is damaged.
    """
    _make_once(path, lambda: write_atomically(path, json.dumps(measure())))
    return read_json(path, "delete it; it is measured again.")


def _make_once(path: Path, make: Callable[[], None]) -> None:
    """Make a file unless it is there; processes wait for the one that makes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            make()


def train_on(
    model: nn.Module,
    batches: Batches,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: Optimizer,
    updates: int,
    generator: torch.Generator,
    before_pass: Callable[[int], None] = lambda _: None,
) -> None:
    """Train a network further, with a cosine schedule; it stays in the mode it is in.

    Args:
        model: The network.
        batches: The images; every pass is in a new order, in batches of nearly one size.
        loss: Of outputs and labels, the mean over samples.
        optimizer: Its optimizer.
        updates: Optimizer steps.
        generator: Draws the orders.
        before_pass: Called with the number of each pass over the images before it.
    """
    images, labels = in_memory(batches.images), batches.labels
    parts = math.ceil(len(labels) / batches.batch_size)
    schedule = CosineAnnealingLR(optimizer, updates)
    order: tuple[Tensor, ...] = ()
    for step in range(updates):
        if step % parts == 0:
            before_pass(step // parts)
            order = torch.randperm(len(labels), generator=generator).tensor_split(parts)
        chosen = order[step % parts].to(labels.device)
        optimizer.zero_grad()
        loss(model(batches.prepare(images[chosen])), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
