"""The networks and batches that speed is measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from gradmask.errors import check_choice
from gradmask.experiments.models import CifarResNet


@dataclass(frozen=True)
class Workload:
    """A network, the shape of one input, and the batch size it is measured with.

    Attributes:
        build: Makes the network.
        shape: Shape of one sample.
        classes: Number of outputs.
        batch_size: Samples in a batch.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    batch_size: int


class Encoder(nn.Module):
    """A 6-layer transformer encoder over 197 tokens of width 384, without custom parameters."""

    def __init__(self, classes: int = 100) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(384, 6, 1536, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(384, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the mean token; x is (N, 197, 384)."""
        logits: Tensor = self.head(self.layers(x).mean(1))
        return logits


def _small_cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for inside, outside in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inside, outside, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def _mlp() -> nn.Module:
    sizes = (784, 1024, 1024, 10)
    layers: list[nn.Module] = []
    for inside, outside in pairwise(sizes):
        layers += [nn.Linear(inside, outside), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


WORKLOADS = {
    "resnet18": Workload(
        lambda: CifarResNet(BasicBlock, [2, 2, 2, 2], 3, 100), (3, 32, 32), 100, 32
    ),
    "small_cnn": Workload(_small_cnn, (3, 32, 32), 10, 128),
    "mlp": Workload(_mlp, (784,), 10, 256),
    "vit_b_16": Workload(torchvision.models.vit_b_16, (3, 224, 224), 1000, 8),
    "encoder": Workload(Encoder, (197, 384), 100, 8),
    "resnet50": Workload(torchvision.models.resnet50, (3, 224, 224), 1000, 64),
}


def make(
    name: str, batch_size: int | None = None, device: str = "cpu"
) -> tuple[nn.Module, Tensor, Tensor]:
    """Build a workload: the network in eval mode, random inputs and labels.

    Args:
        name: Name of the workload.
        batch_size: Samples (default: the workload's own).
        device: Where to put everything.

    Returns:
        Network, inputs, labels.
    """
    check_choice("model", name, WORKLOADS)
    workload = WORKLOADS[name]
    size = batch_size or workload.batch_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = workload.build().eval().to(device)
        inputs = torch.randn(size, *workload.shape).to(device)
        targets = torch.randint(0, workload.classes, (size,)).to(device)
    for module in model.modules():  # torchvision starts some layers at zero, which is too easy
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return model, inputs, targets
