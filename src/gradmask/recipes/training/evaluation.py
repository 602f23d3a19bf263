"""What a network makes of images that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gradmask.recipes.data.batches import Batches
from gradmask.recipes.data.images import ImageData


@dataclass(frozen=True)
class Measured:
    """What a network makes of images.

    Attributes:
        loss: Mean cross-entropy (nats).
        accuracy: Share of right answers.
        per_class: The same of the images of each class; NaN for one that has none.
    """

    loss: float
    accuracy: float
    per_class: list[float]


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, classes: int) -> Measured:
    """Measure a network in eval mode.

    Args:
        model: The network; it stays in eval mode.
        batches: What to measure on; perhaps this process's part of it.
        classes: Number of classes.

    Returns:
        Loss and accuracy over all images.
    """
    model.eval()
    every = batches.labels
    loss = torch.zeros((), dtype=torch.float64, device=every.device)
    right = torch.zeros(classes, dtype=torch.int64, device=every.device)
    for inputs, labels in batches:
        logits = model(inputs)
        loss += F.cross_entropy(logits, labels, reduction="sum")
        right += labels[logits.argmax(1) == labels].bincount(minlength=classes)
    loss, right = batches.world.sum(loss), batches.world.sum(right)
    shares = right.double() / every.bincount(minlength=classes)
    return Measured(loss.item() / len(every), right.sum().item() / len(every), shares.tolist())


def evaluation(
    data: ImageData, model: nn.Module, batches: Callable[..., Batches]
) -> dict[str, Any]:
    """Measure a network on validation and test images.

    Args:
        data: The images.
        model: The network.
        batches: Makes batches of images and labels.

    Returns:
        Losses and accuracies, and the share of the wrong labels that were learnt by heart.
    """
    classes = len(data.class_names)
    val = evaluate(model, batches(data.val_images, data.val_labels), classes)
    test = evaluate(model, batches(data.test_images, data.test_labels), classes)
    row: dict[str, Any] = {"val_loss": val.loss, "val_accuracy": val.accuracy}
    row |= {"test_loss": test.loss, "test_accuracy": test.accuracy}
    row["test_accuracy_per_class"] = [round(share, 4) for share in test.per_class]
    wrong = data.train_labels != data.train_clean_labels
    if wrong.any():
        noise = batches(data.train_images[wrong], data.train_labels[wrong])
        row["memorised"] = evaluate(model, noise, classes).accuracy
    return row
