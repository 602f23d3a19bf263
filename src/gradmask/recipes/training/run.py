"""One training run: a plain loop, with or without the mask."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmask import FisherMask
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.batches import Batches, fisher_batches, training_batches
from gradmask.recipes.data.images import ImageData
from gradmask.recipes.data.stored import worker_errors
from gradmask.recipes.data.transforms import Normalize
from gradmask.recipes.training.checkpoint import describe_run, load_run, save_run
from gradmask.recipes.training.components import autocast, resolve_device
from gradmask.recipes.training.divergence import check_finite, divergence_named
from gradmask.recipes.training.evaluation import evaluation
from gradmask.recipes.training.state import RunState, new_state
from gradmask.recipes.training.weights import remove_weights, save_weights, weights_path
from gradmask.seeding import derive_seed
from gradmask.study.budget import EpochBudget
from gradmask.study.files import keep
from gradmask.study.folder import remove_checkpoints
from gradmask.study.log import START, RunLog
from gradmask.study.trial import Diverged

Row = dict[str, Any]
Record = dict[str, float]
DYNAMICS = "dynamics.pt"  # in the folder of a run
TELL_EVERY = 1.0  # seconds


def train_run(
    config: Comparison,
    data: ImageData,
    arm: str,
    seed: int,
    directory: Path,
    on_epoch: Callable[[Row], None] = lambda _: None,
    observe: Callable[[Row, nn.Module, Batches], None] = lambda *_: None,
    budget: EpochBudget | None = None,
    checkpoints: bool = True,
    on_batch: Callable[[int, float], None] = lambda *_: None,
) -> Row:
    """Train one network and measure it after each epoch, or every few of them.

    All arms of a seed share their initial weights, order of images and augmentation. The mask is
    made after each epoch, from training images without augmentation, for the next one; the first
    epoch is unmasked.

    A run whose folder holds a checkpoint goes on from it. The last epoch's end has none: whoever
    has kept the results removes the last checkpoint.

    Args:
        config: Options of the comparison.
        data: Images of this arm and seed.
        arm: The arm; its options are taken over those of the comparison.
        seed: Seed of the run.
        directory: Folder of this run: `metrics.jsonl`, TensorBoard events, checkpoints and, at the
            end, the state of `gradmask.audit.Dynamics` are written there.
        on_epoch: Called with each epoch's measurements, those of earlier visits first.
        observe: Called after each epoch of this visit, the last one in any case, with its
            measurements, to which it may add, the network, and the training images as the Fisher
            information is measured on them.
        budget: Epochs that may be trained in this visit (default: all).
        checkpoints: Write checkpoints, and go on from one.
        on_batch: Called now and then within an epoch with its number and the share that is done.

    Returns:
        `{"arm", "seed", "seconds", "epochs": [measurements of each epoch]}`, and `"influence"`,
        the records of the monitor, if there is one.

    Raises:
        Diverged: If the loss, or the Fisher information, is no longer finite.
        StateError: If there is a checkpoint that this run cannot go on from.
        EpochsSpent: If the budget is spent before the run is over; it is saved then.
    """
    budget = budget or EpochBudget()
    budget.check()
    started = time.perf_counter()
    config = config.for_arm(arm)
    device = resolve_device(config.device)
    prepare = Normalize.of(data.train_images, config.channels_last)
    precision = autocast(config.precision, device)
    described = describe_run(config, data, arm, seed)  # before the images are on the device
    data = data.to(device)
    steps = math.ceil(len(data.train_labels) / config.batch_size)
    train_set = Batches(data.train_images, data.train_labels, prepare, config.batch_size)
    run = new_state(config, data, arm, seed, train_set, steps)
    world = run.world
    balance = class_weights(data) if config.class_weights == "balanced" else None

    def save_if_due(now: bool = False) -> None:
        done = (run.epoch - 1) * steps + run.step
        if checkpoints and (now or done % (config.checkpoint_every or steps) == 0):
            run.seconds = time.perf_counter() - started
            save_run(directory, described, log.position() if log else START, run)

    told = time.monotonic()

    def after_step() -> None:
        nonlocal told
        if run.monitor is not None:
            write_record(run.monitor.step())
        if run.step < steps:  # the epoch's last is saved at the epoch's end
            save_if_due()
            if (now := time.monotonic()) - told >= TELL_EVERY:
                told = now
                on_batch(run.epoch, run.step / steps)

    def write_record(record: Record | None) -> None:
        if record is not None and log:
            log.write(_in_epochs(record, steps))

    @contextmanager
    def naming_divergence() -> Iterator[None]:
        try:
            with divergence_named(run, train_set, arm, seed, config.lr):
                yield
        except Diverged as error:
            error.run["seconds"] = time.perf_counter() - started
            if checkpoints and world.is_main:  # going on from one would end here again
                remove_checkpoints(directory)
            raise

    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        worker_errors(),
        ExitStack() as stack,
    ):
        torch.manual_seed(derive_seed(seed, "dropout", *[world.rank] * (world.rank > 0)))
        position = load_run(directory, described, run) if checkpoints else None
        log = stack.enter_context(RunLog(directory, position or START)) if world.is_main else None
        if position is not None:
            started -= run.seconds
            for row in run.rows:
                on_epoch(row)
        else:
            if world.is_main:
                remove_weights(directory)  # of an earlier training
            if run.monitor is not None:  # at the start as well
                write_record(run.monitor.measure())
        stack.enter_context(naming_divergence())
        while run.epoch <= config.epochs:
            budget.check()
            row = {"epoch": run.epoch, "lr": run.lr}
            crops = (seed, "crops", run.epoch)
            batches = partial(training_batches, config, data, crops=crops, prepare=prepare)
            row["train_loss"] = train_epoch(
                run, batches, len(data.train_labels), steps, precision, after_step, balance
            )
            row["seconds"] = run.epoch_seconds
            check_finite(row, "train_loss")
            world.same_buffers(run.model)
            last = run.epoch == config.epochs
            if last or run.epoch % config.evaluate_every == 0:
                began = time.perf_counter()
                with precision:
                    row |= evaluation(
                        data, run.model, partial(Batches, prepare=prepare, world=world)
                    )
                row["evaluation_seconds"] = time.perf_counter() - began
            row |= _mask_row(run.mask)  # the mask this epoch was trained with
            if run.mask is not None and not last:
                check_finite(row, *(row.keys() & {"val_loss", "test_loss"}))
                began = time.perf_counter()
                run.mask.refresh(fisher_batches(replace(train_set, world=world)))
                row["refresh_seconds"] = time.perf_counter() - began
            if config.save_every and (run.epoch % config.save_every == 0 or last):
                weights = run.weights()
                if world.is_main:
                    row["weights"] = save_weights(weights_path(directory, run.epoch), weights)
            observe(row, run.model, train_set)
            run.rows.append(row)
            if log:
                log.write(row)
            run.next_epoch()
            budget.count()
            if not last:
                save_if_due(now=budget.spent)
            on_epoch(row)
    run.dynamics.gather()
    if world.is_main:
        keep(directory / DYNAMICS, described, run.dynamics.state_dict())
    seconds = time.perf_counter() - started
    result: Row = {"arm": arm, "seed": seed, "seconds": seconds, "epochs": run.rows}
    if run.monitor is not None:
        result["influence"] = [_in_epochs(record, steps) for record in run.monitor.history]
    return result


def train_epoch(
    run: RunState,
    batches_of: Callable[..., Iterable[tuple[Tensor, Tensor]]],
    images: int,
    steps: int,
    precision: AbstractContextManager[Any],
    after_step: Callable[[], None],
    class_weights: Tensor | None = None,
) -> float:
    """Train what is left of an epoch.

    Args:
        run: The run, which is changed.
        batches_of: `training_batches` with all but the batches, the generator and the processes.
        images: Training images.
        steps: Optimizer steps in an epoch.
        precision: What the network runs in.
        after_step: Called after each step.
        class_weights: Weight of the loss of an image by its label (default: 1).

    Returns:
        Mean training loss over all of the epoch's batches, as they were trained on.
    """
    started = time.perf_counter() - run.epoch_seconds
    order = run.order.clone_state()  # the run's own stays as it is, to draw the same when resumed
    indices = torch.randperm(images, generator=order)
    batches = indices.tensor_split(steps)[run.step :]  # no last batch of one
    run.model.train()
    world = run.world
    inputs_of = batches_of(batches=batches, augmentation=run.augmentation, world=world)
    for batch, (inputs, labels) in zip(batches, inputs_of, strict=True):
        # Engines take the mean over the processes, whose parts of a batch may differ in size.
        scale = len(labels) * world.size / len(batch)
        run.optimizer.zero_grad()
        seen: list[Tensor] = []
        loss_of = partial(_loss, run.trained, inputs, labels, scale, precision, class_weights, seen)
        loss = run.backward(run.model, loss_of, run.scaler.scale)
        run.dynamics.update(world.part(batch), seen[0], labels)  # of `sam` at its own weights
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.schedule.step()
        run.loss += loss * (len(batch) / world.size)
        run.step += 1
        run.epoch_seconds = time.perf_counter() - started
        after_step()
    run.order = order
    train_loss = world.sum(run.loss).item() / images
    run.epoch_seconds = time.perf_counter() - started
    return train_loss


def _loss(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    scale: float,
    precision: AbstractContextManager[Any],
    weights: Tensor | None,
    seen: list[Tensor],
) -> Tensor:
    with precision:
        logits = model(inputs)
        seen.append(logits.detach())
        if weights is None:
            loss = F.cross_entropy(logits, labels)
        else:  # over the number of images, so that no image's weight depends on its batch
            loss = F.cross_entropy(logits, labels, weights, reduction="sum") / len(labels)
    return loss if scale == 1.0 else loss * scale


def class_weights(data: ImageData) -> Tensor:
    """For each class, images ÷ (classes · images of the class): its mean over images is 1."""
    counts = data.train_labels.bincount(minlength=len(data.class_names))
    return len(data.train_labels) / (len(counts) * counts.clamp_min(1).float())


def _mask_row(mask: FisherMask | None) -> Row:
    """The shares that learn: of all parameters, and in order of each."""
    if mask is None:
        return {"kept": 1.0}
    shares = [round(share, 4) for share in mask.kept_fractions.values()]
    return {"kept": mask.kept_fraction, "kept_per_parameter": shares}


def _in_epochs(record: Record, steps: int) -> Row:
    """A monitor's record with its time in epochs as well."""
    return {"epoch": record["step"] / steps, **record}
