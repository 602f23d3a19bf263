"""One training run: a plain loop, with or without the mask."""

from __future__ import annotations

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

from gradmask.errors import DataError
from gradmask.experiments.components import (
    new_mask,
    new_model,
    new_monitor,
    new_optimizer,
    resolve_device,
)
from gradmask.experiments.config import Comparison
from gradmask.experiments.data import ImageData, augment_batch, channel_statistics, normalize
from gradmask.experiments.log import RunLog
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
        `{"arm", "seed", "seconds", "epochs": [measurements of each epoch]}`, and `"influence"`,
        the records of the monitor, if there is one.

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
    monitor = new_monitor(config, model, train_set, seed, steps)
    records: list[Row] = []
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
            if monitor is not None:
                keep_record(monitor.step())
            total += loss.detach() * len(batch)
        return total.item() / len(indices)

    def keep_record(record: Row | None) -> None:
        if record is not None:
            records.append({"epoch": record["step"] / steps, **record})
            log.write_record(records[-1])

    rows: list[Row] = []
    with (
        RunLog(directory) as log,
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(derive_seed(seed, "dropout"))
        if monitor is not None:  # at the start as well
            keep_record(monitor.measure())
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
            log.write_epoch(row)
            on_epoch(row)
    seconds = time.perf_counter() - started
    run: Row = {"arm": arm, "seed": seed, "seconds": seconds, "epochs": rows}
    return run | {"influence": records} if monitor is not None else run


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
