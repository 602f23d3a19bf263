"""Options of the recipe `finetune`."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, ClassVar

from gradmask.errors import OptionError
from gradmask.recipes.config import Comparison, training_of
from gradmask.study.arms import parse_arm
from gradmask.study.options import check_counts

RATES = (0.0003, 0.001, 0.003, 0.01, 0.03)
_KEEPS = (0.1, 0.25, 0.5)
_PENALTIES = (0.01, 0.1, 1.0)
# Arms of this recipe's own: masks of the least information on other data or measured more often,
# and ways without a mask, with the option that each needs.
LOWEST = ("old_lowest", "lowest_each_epoch")
UNMASKED = {"probe": None, "frozen": None, "l2sp": "penalty", "ewc": "penalty", "lora": "rank"}
_MASKS = (
    *("fisher", "fisher:which=lowest", "fisher:score=signal_to_noise", "fisher:score=ratio"),
    *("old_lowest", "lowest_each_epoch"),
    *("random", "random_matched", "random_matched:which=lowest"),
)
ARMS = (
    *("none", "probe", "frozen"),
    *(f"{name}:penalty={penalty}" for name in ("l2sp", "ewc") for penalty in _PENALTIES),
    *(f"lora:rank={rank}" for rank in (2, 8)),
    "slow:keep=0.25",  # without a mask at a lower rate, which is on the front of `none`
    *(f"{mask}:keep={keep}" for mask in _MASKS for keep in _KEEPS),
)
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "data": "uoft-cs/cifar100",
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
        "old_classes": 6,
        "per_class": 5,
        "epochs": 8,
        "updates": 20,
        "old_samples": 200,
    },
}


@dataclass(frozen=True)
class FineTuning:
    """Options of `gradmask run finetune`.

    Attributes:
        data: `digits`, a Hugging Face hub name, a parquet folder or an image folder.
        old_classes: Classes of pretraining, a seeded choice; all others are new.
        per_class: Training images of each new class.
        model: Model name (see `gradmask run compare --help`), with a linear layer at its end.
        width: Base width of the model.
        stem_stride: Stride of the first convolution of the `cifar_resnet` models.
        epochs: Passes over the images of the old classes in pretraining, once for all runs.
        batch_size: Images in a training batch.
        lr: Learning rate of pretraining, the peak of its schedule.
        pretrained: Weights of another study of this recipe with the same data, old classes and
            model, in place of pretraining: its `networks/pretrained.pt`.
        updates: Optimizer steps on the new classes.
        old_samples: Images of the old classes that are kept, for masks and penalties.
        arms: Masks, controls and others: `none`, `fisher:which=lowest:keep=0.25`,
            `ewc:penalty=0.1`, ...
        seeds: One run per arm, seed and learning rate; a seed draws the new images and their order.
        rates: Learning rates that every arm is run with.
        device: `auto`, `cpu`, `cuda`, ...
        jobs: Runs at a time.
        threads: CPU threads of each.
        output: Folder for results.
    """

    EXTENDABLE: ClassVar = ("arms", "seeds", "rates")
    NOT_RESULTS: ClassVar = ("device", "jobs", "threads", "output", "arms", "seeds", "rates")

    data: str = "digits"
    old_classes: int = 80
    per_class: int = 25
    model: str = "small_cnn"
    width: int | None = None
    stem_stride: int = 1
    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.1
    pretrained: Path | None = None
    updates: int = 60
    old_samples: int = 1000
    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rates: tuple[float, ...] = RATES
    device: str = "auto"
    jobs: int = 1
    threads: int | None = None
    output: Path = Path("runs/finetune")

    def __post_init__(self) -> None:
        """Check every option before any work starts.

        Raises:
            OptionError: If an option's value cannot work.
        """
        for arm in self.arms:
            _check_arm(arm)
        check_counts(self, "old_classes", "per_class", "updates", "old_samples")
        if not self.rates or min(self.rates) <= 0:
            raise OptionError(f"rates={list(self.rates)} must be positive learning rates.")
        if self.pretrained is not None and not self.pretrained.is_file():
            raise OptionError(
                f"pretrained={str(self.pretrained)!r} is no file: give the weights that another "
                "study of this recipe has kept, its networks/pretrained.pt."
            )
        self.pretraining()

    def pretraining(self) -> Comparison:
        """How the network is trained on the old classes."""
        return training_of(self)


def _check_arm(name: str) -> None:
    """Check an arm of this recipe, so that none fails after hours of others.

    Raises:
        OptionError: If it is unknown, or has an option that it cannot use, or lacks one.
    """
    arm = parse_arm(name, own=(*LOWEST, *UNMASKED))
    if arm.strategy in UNMASKED:
        needed = UNMASKED[arm.strategy]
        if set(arm.options) != {needed} - {None}:
            form = arm.strategy if needed is None else f"{arm.strategy}:{needed}=..."
            raise OptionError(f"Arm {name!r}: it is written {form!r}.")
        value = arm.options.get("penalty", 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < inf:
            raise OptionError(f"Arm {name!r}: penalty must be a finite number, not negative.")
        rank = arm.options.get("rank", 1)
        if type(rank) is not int or rank < 1:
            raise OptionError(f"Arm {name!r}: rank must be a whole number, at least 1.")
        return
    if arm.strategy in LOWEST:
        arm = parse_arm(":".join(["fisher", "which=lowest", *name.split(":")[1:]]))
    if ":" in arm.strategy:
        raise OptionError(f"Arm {name!r} is a function: compare it with `gradmask study`.")
    if arm.others:
        raise OptionError(f"Arm {name!r}: {min(arm.others)!r} has no meaning in this recipe.")
