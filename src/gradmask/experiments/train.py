"""One training run: a plain loop, with or without the mask."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.tensorboard import SummaryWriter

from gradmask import FisherMask
from gradmask.errors import DataError, OptionError
from gradmask.experiments.arms import parse_arm
from gradmask.experiments.config import Comparison
from gradmask.experiments.data import ImageData, augment_batch, channel_statistics, normalize
from gradmask.experiments.models import build_model
from gradmask.experiments.weights import save_weights, weights_path
from gradmask.seeding import derive_seed, seeded_generator

Row = dict[str, Any]

EVALUATION_BATCH = 1024


@dataclass(frozen=True)
class Batches:
    """Images and labels as they are measured: in order, without augmentation.

    Attributes:
        images: uint8 images, NCHW.
        labels: Their labels.
        prepare: Turns uint8 images into the network's inputs.
        size: Images in a batch.
    """

    images: Tensor
    labels: Tensor
    prepare: Callable[[Tensor], Tensor]
    size: int = EVALUATION_BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `(inputs, labels)` batches; the last may be smaller."""
        parts = zip(self.images.split(self.size), self.labels.split(self.size), strict=True)
        for images, labels in parts:
            yield self.prepare(images), labels


def new_model(config: Comparison, data: ImageData, seed: int) -> nn.Module:
    """Build the network with the initial weights of a seed.

    Args:
        config: Options of the comparison.
        data: The run's images, for channels, size and number of classes.
        seed: Seed of the weights.

    Returns:
        The network on the CPU; the random state of PyTorch is unchanged.
    """
    _, channels, size, _ = data.train_images.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        return build_model(config, channels, size, len(data.class_names))


def new_mask(config: Comparison, model: nn.Module, arm: str, seed: int) -> FisherMask | None:
    """Build the mask of an arm; the arm `none` has none."""
    config, strategy = config.for_arm(arm), parse_arm(arm).strategy
    if strategy == "none":
        return None
    return FisherMask(
        model,
        config.keep,
        scope=config.scope,
        strategy=strategy,
        kind=config.fisher_kind,
        max_samples=config.fisher_samples,
        seed=seed,
    )


def new_optimizer(
    config: Comparison, model: nn.Module, steps: int
) -> tuple[Optimizer, LRScheduler]:
    """Build the optimizer and the learning-rate schedule of a comparison.

    Args:
        config: Options of the comparison.
        model: The network to train.
        steps: Optimizer steps in the whole run.

    Returns:
        Optimizer and schedule; the schedule is stepped after each batch.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            parameters,
            config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov and config.momentum > 0,
            weight_decay=config.weight_decay,
        )
    else:
        optimizer = torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)
    schedulers = torch.optim.lr_scheduler
    if config.schedule == "onecycle":
        return optimizer, schedulers.OneCycleLR(
            optimizer, config.lr, total_steps=steps, cycle_momentum=False
        )
    if config.schedule == "cosine":
        return optimizer, schedulers.CosineAnnealingLR(optimizer, steps)
    return optimizer, schedulers.LambdaLR(optimizer, lambda _: 1.0)


def resolve_device(name: str) -> torch.device:
    """Find the device a comparison runs on.

    Args:
        name: `auto` (CUDA if there is any, else the CPU) or a name that PyTorch knows.

    Returns:
        The device.

    Raises:
        OptionError: If the name is unknown or the machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"device={name!r} cannot be used here: {reason}") from error
    return device


def train_run(
    config: Comparison,
    data: ImageData,
    arm: str,
    seed: int,
    directory: Path,
    on_epoch: Callable[[Row], None] = lambda _: None,
    observe: Callable[[Row, nn.Module, Batches], None] = lambda *_: None,
) -> Row:
    """Train one network and measure it after each epoch.

    All arms of a seed share their initial weights, order of images and augmentation. The mask is
    made after each epoch, from training images without augmentation, for the next one; the first
    epoch is unmasked.

    Args:
        config: Options of the comparison.
        data: Images of this arm and seed.
        arm: The arm; its options are taken over those of the comparison.
        seed: Seed of the run.
        directory: Folder of this run: `metrics.jsonl` and TensorBoard events are written there.
        on_epoch: Called with each epoch's measurements.
        observe: Called after each epoch with its measurements, to which it may add, the network,
            and the training images as the Fisher information is measured on them.

    Returns:
        `{"arm", "seed", "seconds", "epochs": [measurements of each epoch]}`.

    Raises:
        DataError: If the loss is no longer finite.
    """
    started = time.perf_counter()
    config = config.for_arm(arm)
    device = resolve_device(config.device)
    mean, std = channel_statistics(data.train_images)
    prepare = partial(normalize, mean=mean.to(device), std=std.to(device))
    data = data.to(device)
    model = new_model(config, data, seed).to(device)
    steps = math.ceil(len(data.train_labels) / config.batch_size)
    optimizer, schedule = new_optimizer(config, model, steps * config.epochs)
    mask = new_mask(config, model, arm, seed)
    if mask is not None:
        mask.attach(optimizer)
    train_set = Batches(data.train_images, data.train_labels, prepare, config.batch_size)
    order, augmentation = seeded_generator(seed, "order"), seeded_generator(seed, "augmentation")

    def train_epoch() -> float:
        """Mean training loss over the epoch's batches, as they were trained on."""
        total = torch.zeros((), dtype=torch.float64, device=device)
        indices = torch.randperm(len(data.train_labels), generator=order).to(device)
        model.train()
        for batch in indices.tensor_split(steps):  # nearly equal sizes: no last batch of one
            images = augment_batch(config, data.train_images[batch], augmentation)
            loss = F.cross_entropy(model(prepare(images)), data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(batch)
        return total.item() / len(indices)

    rows: list[Row] = []
    with (
        _Log(directory) as log,
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(derive_seed(seed, "dropout"))
        for epoch in range(1, config.epochs + 1):
            row: Row = {"epoch": epoch, "lr": schedule.get_last_lr()[0]}
            row["train_loss"], row["seconds"] = _timed(train_epoch)
            if not math.isfinite(row["train_loss"]):
                raise DataError(
                    f"The training loss of arm {arm!r}, seed {seed} is {row['train_loss']} in "
                    f"epoch {epoch}: training has diverged. Try a lower lr than {config.lr:g}."
                )
            row |= _evaluation(config, data, model, prepare)
            row["kept"] = 1.0
            if mask is not None:  # the mask this epoch was trained with
                row["kept"] = mask.kept_fraction
                row["kept_per_parameter"] = [round(k, 4) for k in mask.kept_fractions.values()]
                if epoch < config.epochs:
                    _, row["refresh_seconds"] = _timed(partial(mask.refresh, train_set))
            if config.save_every and (epoch % config.save_every == 0 or epoch == config.epochs):
                save_weights(weights_path(directory, epoch), model)
            observe(row, model, train_set)
            rows.append(row)
            log.write(row)
            on_epoch(row)
    seconds = time.perf_counter() - started
    return {"arm": arm, "seed": seed, "seconds": seconds, "epochs": rows}


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """Mean loss and accuracy in eval mode.

    Args:
        model: The network; it stays in eval mode.
        batches: What to measure on.

    Returns:
        Mean cross-entropy (nats) and share of right answers over the images.
    """
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=batches.labels.device)
    correct = torch.zeros((), dtype=torch.int64, device=batches.labels.device)
    for inputs, labels in batches:
        logits = model(inputs)
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    return loss.item() / len(batches.labels), correct.item() / len(batches.labels)


def _evaluation(
    config: Comparison, data: ImageData, model: nn.Module, prepare: Callable[[Tensor], Tensor]
) -> Row:
    """Validation and test, and the share of the wrong labels that were learnt by heart."""
    row: Row = {}
    val = Batches(data.val_images, data.val_labels, prepare)
    row["val_loss"], row["val_accuracy"] = evaluate(model, val)
    test = Batches(data.test_images, data.test_labels, prepare)
    row["test_loss"], row["test_accuracy"] = evaluate(model, test)
    wrong = data.train_labels != data.train_clean_labels
    if wrong.any():
        noise = Batches(data.train_images[wrong], data.train_labels[wrong], prepare)
        _, row["memorised"] = evaluate(model, noise)
    return row


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    value = function()
    return value, time.perf_counter() - started


class _Log:
    """`metrics.jsonl` and TensorBoard events of one run, written as it goes."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob("events.out.tfevents.*"):  # of a run that was interrupted
            stale.unlink()
        self._file = (directory / "metrics.jsonl").open("w")
        self._board = SummaryWriter(str(directory))

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()

    def write(self, row: Row) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if isinstance(value, float):
                self._board.add_scalar(name, value, row["epoch"])
