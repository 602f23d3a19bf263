"""Theorem 1 measured: the exact divergence of one sample's step against the quadratic form."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from rich.console import Console
from torch import Tensor, nn

from gradmask.errors import DataError, OptionError, check_choice
from gradmask.experiments.compare import environment, open_folder, to_plain, to_yaml
from gradmask.experiments.config import Comparison
from gradmask.experiments.data import ImageData, load_images
from gradmask.experiments.files import write_atomically, write_json
from gradmask.experiments.models import MODELS
from gradmask.experiments.statistics import Results
from gradmask.experiments.theorem_numbers import FEWEST_POINTS, measure, smooth_twin
from gradmask.experiments.theorem_report import write_theorem
from gradmask.experiments.train import Batches, Row, new_model, resolve_device, train_run
from gradmask.seeding import seeded_generator

FILE = "theorem1.json"
_EXTENDABLE = ("models", "seeds")  # what may be added to a folder later
_RESNETS = "cifar_resnet"

SIZES: dict[str, dict[str, Any]] = {
    "digits": {
        "data": "digits",
        "width": 8,
        "epochs": 2,
        "batch_size": 64,
        "augment": False,
        "sources": 12,
        "probe": 8,
        "steps": 11,
    },
    "small": {
        "data": "uoft-cs/cifar100",
        "classes": 20,
        "train_size": 5000,
        "width": 16,
        "stem_stride": 2,
        "epochs": 5,
    },
    "paper": {
        "data": "uoft-cs/cifar100",
        "models": ("mlp", "small_cnn", "cifar_resnet18"),
        "epochs": 30,
        "sources": 256,
        "probe": 256,
        "steps": 16,
    },
}


@dataclass(frozen=True)
class TheoremCheck:
    """Options of `gradmask run theorem1`: equations 3, 4 and 9 on trained and untrained networks.

    Attributes:
        data: `digits` (embedded), a Hugging Face hub name, a parquet folder or an image folder.
        train_size: Take a seeded stratified part of the training images (default: all).
        classes: Take a seeded choice of the classes (default: all).
        image_size: Resize images to this many pixels (needed when they differ in size).
        augment: Random crop with padding and horizontal flip on training batches.
        models: Model names: `mlp`, `small_cnn`, `cifar_resnet18`, ..., or any torchvision name.
        width: Base width of `mlp`, `small_cnn` and the `cifar_resnet` models (default: theirs).
        stem_stride: Stride of the first convolution of the `cifar_resnet` models.
        epochs: Passes over the training images before the second measurement.
        batch_size: Images in a training batch.
        optimizer: `sgd` or `adamw`.
        lr: Learning rate, the peak of the schedule, and the largest step that is measured.
        momentum: Momentum of `sgd`.
        nesterov: Nesterov momentum for `sgd`.
        weight_decay: Weight decay.
        schedule: `onecycle`, `cosine` or `constant`, stepped after each batch.
        sources: Training images that take a step each.
        probe: Test images whose predictions are looked at.
        decades: The smallest step is this many powers of ten below `lr`.
        steps: Number of step sizes, evenly spaced on a logarithmic scale.
        seeds: One run per model and seed; a seed fixes weights, order, sources and probe.
        device: `auto`, `cpu`, `cuda`, ...
        threads: CPU threads (default: PyTorch's choice).
        output: Folder for results.
    """

    data: str = "digits"
    train_size: int | None = None
    classes: int | None = None
    image_size: int | None = None
    augment: bool = True
    models: tuple[str, ...] = ("mlp", "small_cnn", "cifar_resnet10")
    width: int | None = None
    stem_stride: int = 1
    epochs: int = 5
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: Literal["onecycle", "cosine", "constant"] = "onecycle"
    sources: int = 64
    probe: int = 32
    decades: float = 5.0
    steps: int = 11
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str = "auto"
    threads: int | None = None
    output: Path = Path("runs/theorem1")

    def __post_init__(self) -> None:
        """Check every option before any work starts.

        Raises:
            OptionError: If an option's value cannot work.
        """
        if not self.models or len(set(self.models)) < len(self.models):
            raise OptionError(f"models={list(self.models)} must be one or more different names.")
        known = [*MODELS, *torchvision.models.list_models(module=torchvision.models)]
        for name in self.models:
            check_choice("model", name, known)
            self.training(name)
        if self.sources < 3:
            raise OptionError(f"sources={self.sources!r} must be at least 3, to be ranked.")
        if self.probe < 1:
            raise OptionError(f"probe={self.probe!r} must be at least 1.")
        if self.steps < FEWEST_POINTS:
            raise OptionError(f"steps={self.steps!r} must be at least {FEWEST_POINTS}.")
        if not 0.0 < self.decades <= 12.0:
            raise OptionError(
                f"decades={self.decades!r} must be in (0, 12]: below that all is rounding."
            )

    def training(self, model: str) -> Comparison:
        """How a model is trained: a comparison of one arm, without a mask."""
        return Comparison(
            data=self.data,
            train_size=self.train_size,
            classes=self.classes,
            image_size=self.image_size,
            augment=self.augment,
            model=model,
            width=self.width,
            stem_stride=self.stem_stride if model.startswith(_RESNETS) else 1,
            arms=("none",),
            epochs=self.epochs,
            seeds=self.seeds,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            device=self.device,
            threads=self.threads,
            output=self.output,
        )

    def step_sizes(self) -> list[float]:
        """The measured ε, from small to large; the last is `lr`."""
        between = self.steps - 1
        return [
            self.lr * 10 ** (-self.decades * (between - i) / between) for i in range(self.steps)
        ]


def run_theorem(config: TheoremCheck, console: Console) -> Results:
    """Measure every model with every seed, before and after training, and write the results.

    Training is in float32 and measuring in float64. The output folder then holds `config.yaml`,
    `theorem1.json`, a table, a figure and the findings in words. Runs that `theorem1.json` already
    holds are not done again, so an interrupted run goes on.

    Args:
        config: The options.
        console: Where to say how far the work is.

    Returns:
        The contents of `theorem1.json`.

    Raises:
        GradmaskError: If an option, the data, a model or the folder cannot be used; all of these
            are checked before training starts.
    """
    device = resolve_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.deterministic = True
    config, results = open_folder(config, FILE, _EXTENDABLE)
    _check(config)
    config.output.mkdir(parents=True, exist_ok=True)
    write_atomically(config.output / "config.yaml", to_yaml(config))
    results |= {"config": to_plain(config), "environment": environment(device)}
    done = {(run["model"], run["seed"]) for run in results["runs"]}
    every = [(model, seed) for seed in config.seeds for model in config.models]
    missing = [pair for pair in every if pair not in done]
    if done:
        console.print(f"{len(done)} finished runs found; {len(missing)} to go.")
    for number, (model, seed) in enumerate(missing, start=1):
        run = _run(config, model, seed, device)
        results["runs"].append(run)
        results["runs"].sort(key=lambda r: (config.models.index(r["model"]), r["seed"]))
        write_json(config.output / FILE, results)
        console.print(
            f"[{number}/{len(missing)}] {model}, seed {seed}: {run['seconds']:.1f} s",
            highlight=False,
            markup=False,
        )
    write_json(config.output / FILE, results)
    write_theorem(config.output, results)
    return results


def _check(config: TheoremCheck) -> None:
    """Load the data and build every model once, so that what cannot work fails early."""
    for name in config.models:
        training = config.training(name)
        data = load_images(training, config.seeds[0])
        new_model(training, data, config.seeds[0])
    for option, available in (("sources", data.train_labels), ("probe", data.test_labels)):
        if getattr(config, option) > len(available):
            raise DataError(
                f"{option}={getattr(config, option)} is more than the {len(available)} images."
            )


def _run(config: TheoremCheck, name: str, seed: int, device: torch.device) -> Row:
    """Train one network, and measure it as it was built and as it was trained."""
    started = time.perf_counter()
    training = config.training(name)
    data = load_images(training, seed)
    last: list[tuple[nn.Module, Batches]] = []
    directory = config.output / "runs" / f"{name}-seed{seed}"
    trained = train_run(
        training, data, "none", seed, directory, observe=lambda _, *rest: last.append(rest)
    )
    model, batches = last[-1]
    sources, probe = _samples(config, data, seed, batches, device)
    rates = {"lr": config.lr, "lr_over_batch": config.lr / config.batch_size}
    states = {"initial": new_model(training, data, seed).to(device), "trained": model}
    measurements = []
    for state, network in states.items():
        network = network.double().eval()
        for activation, twin in (("own", network), ("smooth", smooth_twin(network))):
            if twin is not None:
                found = measure(twin, sources, probe, config.step_sizes(), rates)
                measurements.append({"state": state, "activation": activation, **found})
    final = trained["epochs"][-1]
    return {
        "model": name,
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "train_loss": final["train_loss"],
        "test_accuracy": final["test_accuracy"],
        "measurements": measurements,
    }


def _samples(
    config: TheoremCheck, data: ImageData, seed: int, batches: Batches, device: torch.device
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Sources from the training images and a probe set from the test images, in float64."""

    def draw(images: Tensor, labels: Tensor, size: int, purpose: str) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(labels), generator=seeded_generator(seed, purpose))[:size]
        return batches.prepare(images[order].to(device)).double(), labels[order].to(device)

    return (
        draw(data.train_images, data.train_labels, config.sources, "sources"),
        draw(data.test_images, data.test_labels, config.probe, "probe"),
    )
