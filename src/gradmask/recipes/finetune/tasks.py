"""Old and new classes, and a network with a head for each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from gradmask.errors import DataError, OptionError
from gradmask.recipes.data.batches import Batches
from gradmask.recipes.data.images import ImageData, load_images
from gradmask.recipes.data.transforms import Normalize
from gradmask.recipes.finetune.config import FineTuning
from gradmask.recipes.networks import read_network, trained_network
from gradmask.recipes.training.components import resolve_device
from gradmask.seeding import seeded_generator

_SPLIT = 0  # the seed by which classes are old or new, and the network starts
_FAR = -1e9  # a logit that has no probability


@dataclass(frozen=True)
class Tasks:
    """Images of both; the labels of old classes are 0 to `old` - 1, those of new ones follow.

    Attributes:
        data: All images, with these labels.
        old: Number of old classes.
        classes: Of old and new classes together.
        train: Training images of the new classes.
        kept: Training images of the old classes, for masks and penalties.
        parts: Validation and test images of the old and of the new classes.
    """

    data: ImageData
    old: int
    classes: int
    train: Batches
    kept: Batches
    parts: dict[str, Batches]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy among the classes of each sample's own task, summed over samples."""
        is_old = torch.arange(self.classes, device=outputs.device) < self.old
        other = (targets < self.old)[:, None] != is_old
        return F.cross_entropy(outputs.masked_fill(other, _FAR), targets, reduction="sum")


def load_tasks(config: FineTuning, seed: int) -> Tasks:
    """Load the images, and draw those of the new classes that are trained on.

    Args:
        config: Options.
        seed: Seed of the draw.

    Raises:
        OptionError: If there are too few classes.
        DataError: If a new class has too few images.
    """
    data, old = _old_classes_first(config), config.old_classes
    classes = len(data.class_names)
    prepare, generator = Normalize.of(data.train_images), seeded_generator(seed, "new images")
    shuffled = torch.randperm(len(data.train_labels), generator=generator)
    shuffled = shuffled.to(data.train_labels.device)
    chosen = []
    for label in range(old, classes):
        found = shuffled[data.train_labels[shuffled] == label]
        if len(found) < config.per_class:
            raise DataError(
                f"per_class={config.per_class} is more than the {len(found)} training images of "
                f"class {data.class_names[label]!r}."
            )
        chosen.append(found[: config.per_class])
    kept = shuffled[data.train_labels[shuffled] < old][: config.old_samples]

    def batches(part: str, places: Tensor) -> Batches:
        images, of = getattr(data, f"{part}_images"), getattr(data, f"{part}_labels")
        return Batches(images[places], of[places], prepare, config.batch_size)

    parts: dict[str, Batches] = {}
    for part in ("val", "test"):
        is_old = getattr(data, f"{part}_labels") < old
        parts |= {f"{part}_old": batches(part, is_old), f"{part}_new": batches(part, ~is_old)}
    train = batches("train", torch.cat(chosen))
    return Tasks(data, old, classes, train, batches("train", kept), parts)


@lru_cache(maxsize=1)  # for the runs of a process, which differ in the draw only
def _old_classes_first(config: FineTuning) -> ImageData:
    """All images; the labels of old classes, a seeded choice, come first."""
    data = load_images(config.pretraining(), _SPLIT)
    classes = len(data.class_names)
    if config.old_classes >= classes - 1:
        raise OptionError(
            f"old_classes={config.old_classes} of {classes} leaves fewer than two new classes: "
            "lower it."
        )
    order = torch.randperm(classes, generator=seeded_generator(_SPLIT, "old and new classes"))
    renamed = torch.empty_like(order).scatter(0, order, torch.arange(classes))
    labels: dict[str, Any] = {
        name: renamed[getattr(data, name)]
        for name in ("train_labels", "train_clean_labels", "val_labels", "test_labels")
    }
    names = tuple(data.class_names[i] for i in order.tolist())
    return replace(data, class_names=names, **labels).to(resolve_device(config.device))


class TwoHeads(nn.Module):
    """A network's body, its own last layer, which is frozen, and one for the new classes."""

    def __init__(self, network: nn.Module, new_classes: int) -> None:
        super().__init__()
        linear = [n for n, m in network.named_modules() if isinstance(m, nn.Linear)]
        if not linear or not linear[-1]:
            raise OptionError("The model has no linear layer at its end that could be replaced.")
        old = network.get_submodule(linear[-1])
        assert isinstance(old, nn.Linear)
        network.set_submodule(linear[-1], nn.Identity())
        self.body, self.old = network, old.requires_grad_(False)
        self.new = nn.Linear(old.in_features, new_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of the old classes and of the new ones, (samples, classes)."""
        features = self.body(inputs)
        return torch.cat([self.old(features), self.new(features)], 1)


def pretrained(
    config: FineTuning, tasks: Tasks, path: Path, expected: str | None = None
) -> TwoHeads:
    """The network of all runs, trained on the old classes, with a new head yet to be fitted.

    Args:
        config: Options.
        tasks: The images.
        path: Where its weights are kept, unless there is a pretrained network.
        expected: Sum of the weights of that.
    """
    data = tasks.data
    labels = {"train": data.train_labels, "val": data.val_labels, "test": data.test_labels}
    old = data.only(**{part: found < tasks.old for part, found in labels.items()})
    old = replace(old, class_names=data.class_names[: tasks.old])
    how = config.pretraining()
    if config.pretrained is None:
        network = trained_network(how, old, _SPLIT, path)
    else:
        network = read_network(how, old, _SPLIT, config.pretrained, expected)
    model = TwoHeads(network, tasks.classes - tasks.old).eval()
    return model.to(data.train_labels.device)


def start(model: TwoHeads, tasks: Tasks) -> dict[str, Any]:
    """A linear probe of the network's features for the new classes, and the accuracy before.

    Args:
        model: The network.
        tasks: The images.

    Returns:
        `weight` and `bias` of the new head, and what `accuracies` gives with it (`before`).
    """
    with torch.no_grad():
        features = torch.cat([model.body(inputs) for inputs, _ in tasks.train]).cpu()
    labels = tasks.train.labels.cpu() - tasks.old
    probe = LogisticRegression(C=1.0, max_iter=2000).fit(features.numpy(), labels.numpy())
    weight, bias = torch.from_numpy(probe.coef_), torch.from_numpy(probe.intercept_)
    if len(weight) == 1:  # of two classes the library keeps the difference
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    head = {"weight": weight.tolist(), "bias": bias.tolist()}
    set_head(model, head)
    return head | {"before": accuracies(model, tasks)}


@torch.no_grad()
def set_head(model: TwoHeads, head: dict[str, Any]) -> None:
    """Give the new head the weight and bias that `start` found."""
    model.new.weight.copy_(torch.tensor(head["weight"]))
    model.new.bias.copy_(torch.tensor(head["bias"]))


@torch.no_grad()
def accuracies(model: nn.Module, tasks: Tasks) -> dict[str, float]:
    """Accuracy and loss on old and new classes, each among its own, of images not trained on.

    Args:
        model: The network, in eval mode.
        tasks: The images.
    """
    found = {}
    for name, batches in tasks.parts.items():
        first, last = (0, tasks.old) if name.endswith("old") else (tasks.old, tasks.classes)
        right, loss = 0, 0.0
        for inputs, labels in batches:
            outputs = model(inputs)[:, first:last]
            right += int((outputs.argmax(1) + first == labels).sum())
            loss += float(F.cross_entropy(outputs, labels - first, reduction="sum"))
        found[f"{name}_accuracy"] = right / len(batches.labels)
        found[f"{name}_loss"] = loss / len(batches.labels)  # of a network that diverged not finite
    return found
