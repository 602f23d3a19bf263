"""The networks and batches that speed is measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock

from gradmask.benchmarks.language import SMALL, language_model
from gradmask.errors import OptionError, check_choice
from gradmask.named import named
from gradmask.recipes.training.models import CifarResNet


@dataclass(frozen=True)
class Workload:
    """A network, the shape of one input, and the batch size it is measured with.

    Attributes:
        build: Makes the network.
        shape: Shape of one sample.
        batch_size: Samples in a batch.
        tokens: Whether a sample is token ids, each of which has a label.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch_size: int
    tokens: bool = False


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


def _lenet() -> nn.Module:
    """The convolutional network of LeCun et al. (1998), with ReLU."""
    layers: list[nn.Module] = []
    for inside, outside, padding in ((1, 6, 2), (6, 16, 0)):
        layers += [nn.Conv2d(inside, outside, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2)]
    layers.append(nn.Flatten())
    for inside, outside in pairwise((400, 120, 84, 10)):
        layers += [nn.Linear(inside, outside), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _convnext() -> nn.Module:
    """ConvNeXt, shorter and narrower than the smallest of torchvision."""
    sizes = ((64, 128, 2), (128, 256, 2), (256, None, 2))
    model: nn.Module = ConvNeXt([CNBlockConfig(*size) for size in sizes], num_classes=100)
    return model


WORKLOADS = {
    "lenet": Workload(_lenet, (1, 28, 28), 64),
    "convnext": Workload(_convnext, (3, 96, 96), 8),
    "mobilenet_v2": Workload(torchvision.models.mobilenet_v2, (3, 64, 64), 8),
    "resnet18": Workload(lambda: CifarResNet(BasicBlock, [2, 2, 2, 2], 3, 100), (3, 32, 32), 32),
    "small_cnn": Workload(_small_cnn, (3, 32, 32), 128),
    "mlp": Workload(_mlp, (784,), 256),
    "vit_b_16": Workload(torchvision.models.vit_b_16, (3, 224, 224), 8),
    "encoder": Workload(Encoder, (197, 384), 8),
    "resnet50": Workload(torchvision.models.resnet50, (3, 224, 224), 64),
    **{
        name: Workload(partial(language_model, name, small=True), (128,), 8, tokens=True)
        for name in SMALL
    },
}


def find_workload(name: str) -> Workload:
    """Find a workload: a name of ours, of another library, or a function of the user.

    Args:
        name: For example `resnet18` or `gpt2`; `convnext_tiny`, a classifier of torchvision;
            `transformers:gpt2`, a language model with the sizes of its default configuration; or
            `module:function`, which takes nothing and returns the network.

    Returns:
        The workload.

    Raises:
        OptionError: If the name is unknown or the function cannot be imported.
    """
    if name in WORKLOADS:
        return WORKLOADS[name]
    if name.startswith("transformers:"):
        build = partial(language_model, name.partition(":")[2], small=False)
        return Workload(build, (128,), 8, tokens=True)
    if ":" in name:
        return Workload(named("model", name), (3, 224, 224), 32)
    classifiers = torchvision.models.list_models(module=torchvision.models)
    check_choice("model", name, [*WORKLOADS, *classifiers])
    return Workload(lambda: torchvision.models.get_model(name, weights=None), (3, 224, 224), 32)


def make(
    name: str,
    batch_size: int | None = None,
    device: str = "cpu",
    shape: Sequence[int] | None = None,
) -> tuple[nn.Module, Tensor, Tensor]:
    """Build a workload: the network in eval mode, random inputs and labels (of every token).

    Args:
        name: Name of the workload (see `find_workload`).
        batch_size: Samples (default: the workload's own).
        device: Where to put everything.
        shape: Shape of one sample (default: the workload's own).

    Returns:
        Network, inputs, labels.

    Raises:
        OptionError: If the name is unknown, or the network cannot run or gives no logits (samples,
            classes).
    """
    workload = find_workload(name)
    size = batch_size or workload.batch_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs = torch.randn(size, *(shape or workload.shape)).to(device)
        try:
            model = workload.build().eval().to(device)
            if workload.tokens:
                vocabulary = next(m for m in model.modules() if isinstance(m, nn.Embedding))
                inputs = torch.randint(vocabulary.num_embeddings, inputs.shape, device=device)
            with torch.no_grad():
                logits = model(inputs[:1])
        except OptionError:
            raise
        except Exception as error:  # of the user's own function as well
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise OptionError(
                f"model={name!r} cannot run on samples of shape {tuple(inputs.shape[1:])} on "
                f"{device}: {reason.rstrip('.')}. Give another --shape, or another --model."
            ) from error
        if not isinstance(logits, Tensor) or logits.dim() != 2 + workload.tokens:
            raise OptionError(f"model={name!r} does not return logits of shape (samples, classes).")
        form = (size, *logits.shape[2:])
        targets = torch.randint(0, logits.shape[1], form).to(device)
    for module in model.modules():  # torchvision starts some layers at zero, which is too easy
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return model, inputs, targets
