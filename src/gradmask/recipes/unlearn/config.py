"""Options of the recipe `unlearn`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from gradmask.errors import OptionError, check_choice
from gradmask.recipes.config import Comparison, training_of
from gradmask.study.arms import parse_arm
from gradmask.study.options import check_counts

METHODS = {
    "original": "the network as it was trained",
    "retrain": "training anew without what is to be forgotten, from another start",
    "finetune": "training on, on what is to be retained",
    "relabel": "training on, with random other labels for what is to be forgotten",
    "dampen": "selective synaptic dampening",
}
TRAINING = ("finetune", "relabel")  # those that masks and other controls act on
USUAL = "relabel"
# The strength of a method at each level of the sweep: learning rate, or dampening's threshold.
RATES, THRESHOLDS = (0.001, 0.003, 0.01, 0.03), (30.0, 10.0, 3.0, 1.0)
_MASKED = (
    *("fisher:score=saliency", "fisher:score=ratio", "fisher", "random", "slow", "slow_matched"),
    "random_matched:score=saliency",
)
ARMS = (
    *(f"none:method={method}" for method in METHODS),
    *(
        f"{arm}:keep=0.5{'' if arm.startswith('slow') else ':scope=update'}:method=relabel"
        for arm in _MASKED
    ),
)
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "data": "uoft-cs/cifar100",
        "classes": 20,
        "train_size": 5000,
        "model": "cifar_resnet10",
        "width": 16,
        "stem_stride": 2,
        "epochs": 30,
    },
    "paper": {"data": "uoft-cs/cifar100", "model": "cifar_resnet18", "epochs": 100},
    "digits": {
        "data": "digits",
        "model": "small_cnn",
        "width": 8,
        "train_size": 400,
        "forget_count": 30,
        "epochs": 8,
    },
}


@dataclass(frozen=True)
class Unlearning:
    """Options of `gradmask run unlearn`.

    Attributes:
        data: `digits`, a Hugging Face hub name, a parquet folder or an image folder.
        train_size: Take a seeded stratified part of the training images (default: all).
        classes: Take a seeded choice of the classes (default: all).
        model: Model name (see `gradmask run compare --help`).
        width: Base width of the model.
        stem_stride: Stride of the first convolution of the `cifar_resnet` models.
        epochs: Passes over the training images of the network that is to forget.
        batch_size: Images in a training batch.
        lr: Learning rate of that training, the peak of its schedule.
        forget: All images of one `class`, or as many at `random` as `forget_count`.
        forget_count: How many.
        more_epochs: Passes over the images of each method that trains on.
        arms: Masks and controls, each with a method: `none:method=retrain`, ...
        seeds: One run per arm, seed and level.
        levels: Strengths of each method, 1 to 4.
        device: `auto`, `cpu`, `cuda`, ...
        jobs: Runs at a time.
        threads: CPU threads of each.
        output: Folder for results.
    """

    EXTENDABLE: ClassVar = ("arms", "seeds")
    NOT_RESULTS: ClassVar = ("device", "jobs", "threads", "output", "arms", "seeds", "levels")

    data: str = "digits"
    train_size: int | None = None
    classes: int | None = None
    model: str = "small_cnn"
    width: int | None = None
    stem_stride: int = 1
    epochs: int = 30
    batch_size: int = 64
    lr: float = 0.1
    forget: Literal["class", "random"] = "class"
    forget_count: int = 200
    more_epochs: int = 5
    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    levels: tuple[int, ...] = (1, 2, 3, 4)
    device: str = "auto"
    jobs: int = 1
    threads: int | None = None
    output: Path = Path("runs/unlearn")

    def __post_init__(self) -> None:
        """Check every option before any work starts.

        Raises:
            OptionError: If an option's value cannot work.
        """
        check_choice("forget", self.forget, ("class", "random"))
        for arm in self.arms:
            _check_arm(arm)
        check_counts(self, "forget_count", "more_epochs")
        if not self.levels or not set(self.levels) <= {1, 2, 3, 4}:
            raise OptionError(f"levels={list(self.levels)} must be among 1, 2, 3 and 4.")
        self.training()

    def training(self) -> Comparison:
        """How the network that is to forget is trained."""
        return training_of(self)


def _check_arm(name: str) -> None:
    """Check an arm of this recipe, so that none fails after hours of others.

    Raises:
        OptionError: If it is unknown, or has an option or method that it cannot use.
    """
    arm = parse_arm(name)
    if ":" in arm.strategy:
        raise OptionError(f"Arm {name!r} is a function: compare it with `gradmask study`.")
    if odd := arm.others.keys() - {"method"}:
        raise OptionError(f"Arm {name!r}: {min(odd)!r} has no meaning in this recipe.")
    method = arm.others.get("method", USUAL)
    check_choice(f"method of arm {name!r},", method, METHODS)
    if arm.strategy != "none" and method not in TRAINING:
        raise OptionError(
            f"Arm {name!r}: nothing is masked in {METHODS[method]}: take a method that trains on, "
            f"{' or '.join(TRAINING)}."
        )
