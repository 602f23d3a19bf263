"""Networks for small images, and all classifiers of torchvision, by name."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from gradmask.errors import OptionError, check_choice
from gradmask.named import named
from gradmask.recipes.config import Comparison

_RESNETS: dict[str, tuple[type[nn.Module], list[int]]] = {
    "cifar_resnet10": (BasicBlock, [1, 1, 1, 1]),
    "cifar_resnet18": (BasicBlock, [2, 2, 2, 2]),
    "cifar_resnet34": (BasicBlock, [3, 4, 6, 3]),
    "cifar_resnet50": (Bottleneck, [3, 4, 6, 3]),
}

MODELS = ("mlp", "small_cnn", "cifar_vit", *_RESNETS)


def build_model(
    config: Comparison, in_channels: int, image_size: int, num_classes: int
) -> nn.Module:
    """Build the network of a comparison with random weights.

    Args:
        config: Options of the comparison: `model`, `width` and `stem_stride`.
        in_channels: Channels of the images.
        image_size: Height and width of the images.
        num_classes: Number of outputs.

    Returns:
        The network, in training mode.

    Raises:
        OptionError: If the name is unknown or the model does not take the options given.
    """
    name = config.model
    if ":" in name:
        for option in ("width", "stem_stride"):
            if getattr(config, option) != getattr(Comparison, option):
                raise OptionError(f"{option} is an option of {', '.join(MODELS)}, not of {name}.")
        sizes = {"classes": num_classes, "channels": in_channels, "image_size": image_size}
        return _own_model(name, sizes)
    classifiers = torchvision.models.list_models(module=torchvision.models)
    check_choice("model", name, [*MODELS, *classifiers])
    if name not in _RESNETS and config.stem_stride != 1:
        raise OptionError(f"stem_stride is an option of {', '.join(_RESNETS)}, not of {name}.")
    if name not in MODELS:
        if config.width is not None:
            raise OptionError(f"width is an option of {', '.join(MODELS)}, not of {name}.")
        return _torchvision_model(name, in_channels, image_size, num_classes)
    if name == "mlp":
        return _mlp(in_channels * image_size**2, config.width or 256, num_classes)
    if name == "small_cnn":
        return _small_cnn(in_channels, config.width or 32, num_classes)
    if name == "cifar_vit":
        return CifarVit(in_channels, image_size, num_classes, config.width or 128)
    block, layers = _RESNETS[name]
    width = config.width or 64
    return CifarResNet(block, layers, in_channels, num_classes, width, config.stem_stride)


def _own_model(name: str, sizes: dict[str, int]) -> nn.Module:
    """A network of the user's own: a function is called with those of the sizes that it takes."""
    function = named("model", name)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # of what is compiled
        parameters = []
    every = any(p.kind is p.VAR_KEYWORD for p in parameters)
    given = {k: v for k, v in sizes.items() if every or any(p.name == k for p in parameters)}
    try:
        model = function(**given)
    except Exception as error:  # of the user's code
        raise OptionError(
            f"model={name!r} fails ({type(error).__name__}: {error}). It is called with those of "
            f"{', '.join(f'{k}={v}' for k, v in sizes.items())} that it takes by name; give all "
            "its other parameters a default."
        ) from error
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"model={name!r} must return a torch.nn.Module, and returned {type(model).__name__}."
        )
    return model.train()


class CifarVit(nn.Module):
    """A vision transformer for small images: patches of 4 pixels, LayerNorm first, mean pooling.

    Args:
        in_channels: Channels of the images.
        image_size: Height and width of the images.
        num_classes: Number of outputs.
        width: Width of a token; every 32 are a head.
        depth: Layers.
    """

    def __init__(
        self, in_channels: int, image_size: int, num_classes: int, width: int, depth: int = 4
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, width, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (image_size // 4) ** 2, width))
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 32), 4 * width, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (samples, classes) of images (samples, channels, height, width)."""
        tokens = self.patches(images).flatten(2).mT + self.positions
        logits: Tensor = self.head(self.norm(self.layers(tokens)).mean(1))
        return logits


class CifarResNet(ResNet):  # type: ignore[misc]  # torchvision has no types
    """Torchvision's ResNet with a 3x3 stem, no max pooling and any base width.

    Args:
        block: Torchvision's `BasicBlock` or `Bottleneck`.
        layers: Blocks in each of the four stages.
        in_channels: Channels of the images.
        num_classes: Number of outputs.
        width: Channels of the first stage; each later stage has twice those before it.
        stem_stride: Stride of the first convolution.
    """

    def __init__(
        self,
        block: type[Any],
        layers: list[int],
        in_channels: int,
        num_classes: int,
        width: int = 64,
        stem_stride: int = 1,
    ) -> None:
        self.width = width  # before the stages are built, which need it
        super().__init__(block, layers, num_classes=num_classes)
        self.conv1 = nn.Conv2d(in_channels, width, 3, stem_stride, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity()
        self.fc = nn.Linear(8 * width * block.expansion, num_classes)

    def _make_layer(
        self, block: type[Any], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        # Torchvision asks for 64, 128, 256 and 512 planes, and its BasicBlock refuses any other
        # `width_per_group`, so the planes themselves are scaled.
        if planes == 64:
            self.inplanes = self.width
        planes = planes // 64 * self.width
        stage: nn.Sequential = super()._make_layer(block, planes, blocks, stride, dilate)
        return stage


def _torchvision_model(name: str, in_channels: int, image_size: int, num_classes: int) -> nn.Module:
    if in_channels != 3:
        raise OptionError(
            f"{name} takes colour images, not {in_channels} channel(s): use one of "
            f"{', '.join(MODELS)}."
        )
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):  # their auxiliary heads return more than logits
        options = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):  # its position embedding is made for one size
        options = {"image_size": image_size}
    model: nn.Module = torchvision.models.get_model(
        name, weights=None, num_classes=num_classes, **options
    )
    return model


# Layers have names, because the report shows them.
def _mlp(inputs: int, width: int, num_classes: int) -> nn.Module:
    layers: dict[str, nn.Module] = {
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(inputs, width),
        "relu1": nn.ReLU(),
        "fc2": nn.Linear(width, width),
        "relu2": nn.ReLU(),
        "fc3": nn.Linear(width, num_classes),
    }
    return nn.Sequential(OrderedDict(layers))


def _small_cnn(in_channels: int, width: int, num_classes: int) -> nn.Module:
    layers: dict[str, nn.Module] = {}
    channels = in_channels
    for i, (planes, stride) in enumerate(((width, 1), (2 * width, 2), (4 * width, 2)), start=1):
        layers |= {
            f"conv{i}": nn.Conv2d(channels, planes, 3, stride, padding=1, bias=False),
            f"norm{i}": nn.BatchNorm2d(planes),
            f"relu{i}": nn.ReLU(),
        }
        channels = planes
    layers |= {
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(channels, num_classes),
    }
    return nn.Sequential(OrderedDict(layers))
