"""Named experiments: defaults that each option of the command line can change."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradmask.errors import OptionError, check_choice
from gradmask.recipes.config import Comparison
from gradmask.recipes.finetune.config import SIZES as FINETUNE_SIZES
from gradmask.recipes.finetune.config import FineTuning
from gradmask.recipes.theorem.config import SIZES as THEOREM_SIZES
from gradmask.recipes.theorem.config import TheoremCheck
from gradmask.recipes.unlearn.config import SIZES as UNLEARN_SIZES
from gradmask.recipes.unlearn.config import Unlearning

Options = Comparison | TheoremCheck | Unlearning | FineTuning


@dataclass(frozen=True)
class Recipe:
    """A named experiment.

    Attributes:
        name: What follows `gradmask run`.
        description: One line.
        options: Options that differ from the defaults of `kind`.
        sizes: More options for each size it can be run at; the first is the default.
        kind: The dataclass of its options.
    """

    name: str
    description: str
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    kind: type[Options] = Comparison

    def config(self, size: str | None = None, **changes: Any) -> Options:
        """The recipe's options with some of them changed.

        Args:
            size: One of `sizes`.
            changes: Options of `kind`.

        Returns:
            The options.

        Raises:
            OptionError: If the size is unknown, or an option cannot work.
        """
        return self.kind(**(self.defaults(size) | changes))

    def defaults(self, size: str | None = None) -> dict[str, Any]:
        """Options that differ from the defaults of `kind`, at one of the sizes."""
        options: dict[str, Any] = {"output": Path("runs") / self.name, **self.options}
        if size is not None and not self.sizes:
            raise OptionError(f"Recipe {self.name!r} has one size only: leave --size out.")
        if self.sizes:
            size = size or next(iter(self.sizes))
            check_choice("size", size, self.sizes)
            options |= {"output": Path("runs") / f"{self.name}-{size}", **self.sizes[size]}
        return options


# Overfitting soon and plainly: no augmentation, a constant learning rate.
_OVERFITTING = {"augment": False, "schedule": "constant", "lr": 0.02, "batch_size": 64}
_SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "data": "uoft-cs/cifar100",
        "classes": 20,
        "train_size": 3000,
        "model": "cifar_resnet10",
        "width": 16,
        "stem_stride": 2,
        "fisher_samples": 1000,
    },
    "paper": {
        "data": "uoft-cs/cifar100",
        "model": "cifar_resnet18",
        "batch_size": 128,
        "epochs": 60,
        "monitor_sources": 128,
        "monitor_probe": 512,
    },
    "digits": {
        "data": "digits",
        "model": "small_cnn",
        "width": 8,
        "train_size": 400,
        "epochs": 10,
        "monitor_sources": 16,
        "monitor_probe": 32,
    },
}
# "Coefficient 0.75": three quarters learn, or three quarters are masked.
_TABLE1 = (
    "none",
    "fisher:keep=0.25",
    "fisher:keep=0.75",
    "random:keep=0.25",
    "random:keep=0.75",
    "random_matched:keep=0.25",
    "random_matched:keep=0.75",
    "inverse:keep=0.25",
    "inverse:keep=0.75",
    "fisher:keep=0.25:scope=update",
    "fisher:keep=0.75:scope=update",
    "random_matched:keep=0.25:scope=update",
    "random_matched:keep=0.75:scope=update",
    "sam",
)
# Every score that needs one data set, at both ends, each beside its matched control.
_BY_SCORE = tuple(
    f"{strategy}:score={score}:which={which}"
    for score in (
        *("fisher", "signal_to_noise", "saliency", "snip", "fisher_weight", "magnitude"),
        "gradient_to_weight",
    )
    for which in ("highest", "lowest")
    for strategy in ("fisher", "random_matched")
)
_OVERFIT = tuple(
    arm
    for keep in (0.25, 0.5, 0.75)
    for arm in (
        *(f"fisher:keep={keep}", f"fisher:keep={keep}:scope=update"),
        *(f"random_matched:keep={keep}", f"random_matched:keep={keep}:scope=update"),
        *(f"slow:keep={keep}", f"slow_matched:keep={keep}"),
    )
)


RECIPES = (
    Recipe("compare", "no mask, the Fisher mask and three controls, on any data and model"),
    Recipe(
        "demo",
        "scikit-learn's digits with 40 % wrong labels: 2 minutes on two cores",
        {
            "data": "digits",
            "label_noise": 0.4,
            "augment": False,
            "model": "small_cnn",
            "epochs": 30,
            "batch_size": 64,
            "fisher_samples": 300,
        },
    ),
    Recipe(
        "cifar100-small",
        "20 classes of CIFAR-100 with 250 images each, a narrow ResNet: minutes on a CPU",
        {
            "data": "uoft-cs/cifar100",
            "classes": 20,
            "train_size": 5000,
            "model": "cifar_resnet10",
            "width": 32,
            "stem_stride": 2,
            "fisher_samples": 1000,
            "epochs": 30,
        },
    ),
    Recipe(
        "figure1",
        "influence over training on true and on random labels (equation 8, figure 1)",
        _OVERFITTING
        | {
            "arms": ("none", "none:labels=random"),
            "epochs": 40,
            "monitor": ("quadratic", "diagonal", "kl"),
            "monitor_fisher": "exact",
            "monitor_sources": 32,
            "monitor_probe": 64,
            "monitor_step": 0.001,
        },
        _SIZES | {"small": _SIZES["small"] | {"monitor_every": 86}},  # two epochs
    ),
    Recipe(
        "figure2",
        "influence and test loss with and without a mask, trained until it overfits (figure 2)",
        _OVERFITTING
        | {
            "arms": (
                "none",
                "fisher:keep=0.8",
                "fisher:keep=0.7",
                "fisher:keep=0.3",
                "fisher:keep=0.2",
                "random:keep=0.7",
                "random:keep=0.3",
            ),
            "epochs": 30,
            "monitor": ("quadratic",),
            "monitor_step": 0.001,
        },
        _SIZES,
    ),
    Recipe(
        "table1-cifar100",
        "test accuracy with the mask in both readings of the paper's 0.75, and controls (table 1)",
        {
            "data": "uoft-cs/cifar100",
            "arms": _TABLE1,
            "schedule": "cosine",
        },
        {
            "small": _SIZES["small"] | {"train_size": 5000, "epochs": 25},
            "paper": {"model": "cifar_resnet18", "epochs": 200},
            "digits": _SIZES["digits"] | {"augment": False},
        },
    ),
    Recipe(
        "table1-imagenet",
        "the same on ImageNet, or photographs of your own, decoded as they are needed",
        {
            # Torchvision's reference recipe for ResNet-50.
            "data": "ILSVRC/imagenet-1k",
            "streaming": True,
            "arms": _TABLE1,
            "schedule": "step",
            "nesterov": False,
            "weight_decay": 1e-4,
        },
        {
            "small": {
                "image_size": 64,
                "model": "resnet18",
                "epochs": 15,
                "batch_size": 64,
                "lr": 0.05,
                "fisher_samples": 1000,
            },
            "paper": {
                "image_size": 224,
                "model": "resnet50",
                "epochs": 90,
                "batch_size": 256,
                "validation": 0.01,
                "fisher_samples": 4000,
            },
        },
    ),
    Recipe(
        "overfit",
        "no augmentation, trained until all is learnt by heart: does the paper's mask help there?",
        _OVERFITTING | {"arms": ("none", "early", *_OVERFIT), "seeds": tuple(range(10))},
        {
            "small": _SIZES["small"] | {"train_size": 2000, "epochs": 16, "fisher_samples": 500},
            "paper": {"data": "uoft-cs/cifar100", "model": "cifar_resnet18", "epochs": 60},
            "digits": _SIZES["digits"],
        },
    ),
    Recipe(
        "noise",
        "20 % wrong labels, also where the epoch is chosen: every score at both ends, and controls",
        {
            "arms": ("none", "slow", "early", "random", *_BY_SCORE),
            "label_noise": 0.2,
            "noisy_validation": True,
            "seeds": tuple(range(5)),
        },
        {
            "small": _SIZES["small"] | {"train_size": 2000, "epochs": 20, "fisher_samples": 500},
            "paper": {"data": "uoft-cs/cifar100", "model": "cifar_resnet18", "epochs": 120},
            "digits": _SIZES["digits"] | {"augment": False},
        },
    ),
    Recipe(
        "finetune",
        "fine-tuning on new classes without forgetting the old: fronts of masks and of others",
        sizes=FINETUNE_SIZES,
        kind=FineTuning,
    ),
    Recipe(
        "unlearn",
        "a trained network forgets a class, or some images: masks and others against retraining",
        sizes=UNLEARN_SIZES,
        kind=Unlearning,
    ),
    Recipe(
        "theorem1",
        "exact divergence against its quadratic and diagonal form, step by step (theorem 1)",
        sizes=THEOREM_SIZES,
        kind=TheoremCheck,
    ),
)


def find_recipe(name: str) -> Recipe:
    """Find a recipe by name.

    Args:
        name: The recipe's name.

    Returns:
        The recipe.

    Raises:
        OptionError: If the name is unknown; the message names the nearest.
    """
    check_choice("recipe", name, [recipe.name for recipe in RECIPES])
    return next(recipe for recipe in RECIPES if recipe.name == name)
