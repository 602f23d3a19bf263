"""Recipe `unlearn`: a trained network forgets some images; how near does it come to retraining?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmask import SCORES, dampen
from gradmask.errors import OptionError
from gradmask.recipes.audit.detection import auroc
from gradmask.recipes.data.batches import Batches
from gradmask.recipes.data.images import ImageData, load_images
from gradmask.recipes.data.sources import in_memory
from gradmask.recipes.data.transforms import Normalize
from gradmask.recipes.networks import remembered, shared_folder, train_on, trained_network
from gradmask.recipes.training.components import new_model, resolve_device
from gradmask.recipes.training.evaluation import evaluate
from gradmask.recipes.unlearn.config import RATES, THRESHOLDS, TRAINING, USUAL, Unlearning
from gradmask.seeding import seeded_generator
from gradmask.study import Trial, compare
from gradmask.study.options import from_plain, to_plain
from gradmask.study.progress import Progress
from gradmask.study.results import Results


@dataclass(frozen=True)
class Parts:
    """The images of a run, as batches: what to forget and what to retain, and others."""

    forget: Batches
    retain: Batches
    unseen: Batches  # like those to forget, and never trained on
    val: Batches
    test: Batches
    classes: int


def run_unlearning(config: Unlearning, progress: Progress) -> Results:
    """Compare ways to forget with retraining.

    Args:
        config: Options.
        progress: Shows how far the work is.

    Returns:
        The contents of `results.json`; `test_gap` is the mean distance from the retrained network.
    """
    options = {k: v for k, v in to_plain(config).items() if k not in Unlearning.NOT_RESULTS}
    # What cannot work is told before the folder is made.
    data = _images(config, config.seeds[0])
    new_model(config.training(), data, config.seeds[0])
    _forgotten(config, data, config.seeds[0])
    return compare(
        train,
        config.arms,
        config.seeds,
        config.output,
        progress=progress,
        options={"config": options},
        sweep={"level": list(config.levels)},
        choose="val_gap",
        judge=("test_gap@last",),
        metrics={"val_gap": "lower", "test_gap": "lower", "forget_accuracy": "lower"},
        jobs=config.jobs,
        threads=config.threads,
    )


def train(trial: Trial) -> None:
    """Let one network forget, and measure how near it comes to one that never saw the images.

    Args:
        trial: The run: its options are the method and its level.
    """
    config: Unlearning = from_plain(Unlearning, trial.options["config"])
    method, level = trial.options.get("method", USUAL), trial.options["level"] - 1
    training, folder = config.training(), shared_folder(trial)
    data = _images(config, trial.seed)
    forgotten = _forgotten(config, data, trial.seed)
    parts = _parts(data, forgotten, config)
    retained = data.only(train=~forgotten)
    trained = partial(trained_network, training)
    if method == "retrain":
        start = 1000 + trial.seed
        model = trained(retained, start, folder / f"retrained-seed{trial.seed}.pt")
    else:
        model = trained(data, trial.seed, folder / f"original-seed{trial.seed}.pt")
    if method == "dampen":
        model.eval()
        dampen(model, parts.forget, parts.retain, threshold=THRESHOLDS[level], seed=trial.seed)
    elif method in TRAINING:
        _train_on(trial, model, parts, config, RATES[level], relabel=method == "relabel")
    reference = folder / f"reference-seed{trial.seed}.pt"
    wanted = remembered(
        folder / f"measured-seed{trial.seed}.json",
        lambda: measured(trained(retained, trial.seed, reference), parts),
    )
    found = measured(model, parts)
    trial.report(epoch=config.more_epochs, **distances(found, wanted), **found)


@lru_cache(maxsize=1)  # for the runs of a process
def _images(config: Unlearning, seed: int) -> ImageData:
    return load_images(config.training(), seed).to(resolve_device(config.device))


def _forgotten(config: Unlearning, data: ImageData, seed: int) -> Tensor:
    """Which training images are to be forgotten."""
    labels, generator = data.train_labels, seeded_generator(seed, "forget")
    if config.forget == "class":
        chosen = int(torch.randint(len(data.class_names), (), generator=generator))
        return labels == chosen
    if config.forget_count >= len(labels):
        raise OptionError(
            f"forget_count={config.forget_count} leaves none of the {len(labels)} training images."
        )
    first = torch.randperm(len(labels), generator=generator)[: config.forget_count]
    return torch.zeros_like(labels, dtype=torch.bool).scatter(0, first.to(labels.device), True)


def _parts(data: ImageData, forgotten: Tensor, config: Unlearning) -> Parts:
    """Without the test and validation images of a class that is to be forgotten, set apart."""
    prepare = Normalize.of(data.train_images)
    gone = data.train_labels[forgotten] if config.forget == "class" else data.train_labels[:0]

    def batches(part: str, where: Tensor) -> Batches:
        images, labels = getattr(data, f"{part}_images"), getattr(data, f"{part}_labels")
        return Batches(images[where], labels[where], prepare, config.batch_size)

    test_gone = torch.isin(data.test_labels, gone)
    return Parts(
        forget=batches("train", forgotten),
        retain=batches("train", ~forgotten),
        unseen=batches("test", test_gone if config.forget == "class" else ~test_gone),
        val=batches("val", ~torch.isin(data.val_labels, gone)),
        test=batches("test", ~test_gone),
        classes=len(data.class_names),
    )


def _train_on(
    trial: Trial, model: nn.Module, parts: Parts, config: Unlearning, lr: float, relabel: bool
) -> None:
    """Train on, with the trial's mask, which is measured once, on what is to be forgotten."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    mask = trial.mask(model, optimizer, max_samples=None)
    compares = SCORES[mask.score].compares
    mask.refresh(parts.forget, **({"protect": parts.retain} if compares else {}))
    batches, generator = parts.retain, seeded_generator(trial.seed, "training on")
    if relabel:
        forget = parts.forget
        offset = torch.randint(1, parts.classes, forget.labels.shape, generator=generator)
        others = (forget.labels + offset.to(forget.labels.device)) % parts.classes
        images = torch.cat([in_memory(batches.images), in_memory(forget.images)])
        batches = replace(batches, images=images, labels=torch.cat([batches.labels, others]))
    updates = config.more_epochs * math.ceil(len(batches.labels) / config.batch_size)
    train_on(model.train(), batches, F.cross_entropy, optimizer, updates, generator)


def distances(found: Mapping[str, float], wanted: Mapping[str, float]) -> dict[str, float]:
    """Mean distance in accuracies and the attack's AUROC, with test (or validation) images only.

    Args:
        found: Of the network that should have forgotten.
        wanted: Of the one trained anew.
    """
    apart = {n: abs(found[n] - wanted[n]) for n in found if not n.endswith("_loss")}
    return {
        f"{part}_gap": sum(v for k, v in apart.items() if k != f"{other}_accuracy") / 4
        for part, other in (("val", "test"), ("test", "val"))
    }


def measured(model: nn.Module, parts: Parts) -> dict[str, float]:
    """Accuracies, and the AUROC by which losses tell what was to be forgotten from unseen images.

    A half is chance: nothing shows that the images were trained on (the attack of Yeom et al.,
    2018, by the loss). With the mean losses, of which those of a network that diverged are not
    finite.

    Args:
        model: The network.
        parts: The images.
    """
    shares = {
        f"{name}_accuracy": evaluate(model, getattr(parts, name), parts.classes).accuracy
        for name in ("forget", "retain", "val", "test")
    }
    inside, outside = _losses(model, parts.forget), _losses(model, parts.unseen)
    shares |= {"forget_loss": float(inside.mean()), "unseen_loss": float(outside.mean())}
    if not torch.cat([inside, outside]).isfinite().all():
        return shares | {"membership_auroc": math.nan}
    members = torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))]).bool()
    return shares | {"membership_auroc": auroc(-torch.cat([inside, outside]), members)}


@torch.no_grad()
def _losses(model: nn.Module, batches: Batches) -> Tensor:
    model.eval()
    return torch.cat([F.cross_entropy(model(x), y, reduction="none") for x, y in batches])
