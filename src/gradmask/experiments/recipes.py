"""Named comparisons: defaults that each option of the command line can change."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradmask.errors import check_choice
from gradmask.experiments.config import Comparison


@dataclass(frozen=True)
class Recipe:
    """A named comparison.

    Attributes:
        name: What follows `gradmask run`.
        description: One line.
        options: Options that differ from the defaults of `Comparison`.
    """

    name: str
    description: str
    options: dict[str, Any] = field(default_factory=dict)

    def config(self, **changes: Any) -> Comparison:
        """The recipe's options with some of them changed."""
        output = {"output": Path("runs") / self.name}
        return Comparison(**(output | self.options | changes))


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
