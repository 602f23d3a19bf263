"""One frozen dataclass holds every option of the recipe `theorem1`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from gradmask.errors import OptionError
from gradmask.recipes.config import Comparison
from gradmask.study.options import check_counts

FEWEST_POINTS = 3  # that a slope is fitted to

SIZES: dict[str, dict[str, Any]] = {
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
        checkpoint_every: Optimizer steps between checkpoints, from which interrupted training goes
            on (default: those of an epoch).
        stop_after: Epochs to train in this visit, all runs together; the same command goes on
            (default: all).
        device: `auto`, `cpu`, `cuda`, ...
        threads: CPU threads (default: PyTorch's choice).
        output: Folder for results.
    """

    EXTENDABLE: ClassVar = ("models", "seeds")
    NOT_RESULTS: ClassVar = Comparison.NOT_RESULTS

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
    checkpoint_every: int | None = None
    stop_after: int | None = None
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
        for name in self.models:
            self.training(name)
        if self.sources < 3:
            raise OptionError(f"sources={self.sources!r} must be at least 3, to be ranked.")
        check_counts(self, "probe")
        if self.steps < FEWEST_POINTS:
            raise OptionError(f"steps={self.steps!r} must be at least {FEWEST_POINTS}.")
        if not 0.0 < self.decades <= 12.0:
            raise OptionError(
                f"decades={self.decades!r} must be in (0, 12]: below that all is rounding."
            )

    def training(self, model: str) -> Comparison:
        """How a model is trained: a comparison of one arm, without a mask."""
        shared = {name: getattr(self, name) for name in _SHARED}
        stride = self.stem_stride if model.startswith("cifar_resnet") else 1  # others have none
        return Comparison(**shared | {"model": model, "stem_stride": stride, "arms": ("none",)})

    def step_sizes(self) -> list[float]:
        """The measured ε, from small to large; the last is `lr`."""
        between = self.steps - 1
        return [
            self.lr * 10 ** (-self.decades * (between - i) / between) for i in range(self.steps)
        ]


_SHARED = {f.name for f in fields(TheoremCheck)} & {f.name for f in fields(Comparison)}
