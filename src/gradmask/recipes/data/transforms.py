"""What is done to uint8 images on the device, whole batches at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from gradmask.recipes.config import Comparison
from gradmask.recipes.data.own import Transform
from gradmask.recipes.data.sources import Images
from gradmask.recipes.data.stored import StoredImages

# Mean and standard deviation of ImageNet's channels, which its recipes use for all photographs.
PHOTOGRAPHS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Normalize:
    """Turns uint8 images into inputs with `normalize`, on any device and in any process.

    Attributes:
        mean: Mean of each channel on the scale 0 to 1.
        std: Standard deviation of each channel.
        channels_last: Give the inputs this memory layout.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels_last: bool = False

    @classmethod
    def of(cls, images: Images, channels_last: bool = False) -> Normalize:
        """With the statistics of training images; of those not in memory, with common ones."""
        if isinstance(images, StoredImages):
            return cls(*PHOTOGRAPHS, channels_last)
        mean, std = channel_statistics(images)
        return cls(tuple(mean.tolist()), tuple(std.tolist()), channels_last)

    def __call__(self, images: Tensor) -> Tensor:
        """Inputs of a network for uint8 images."""
        if self.channels_last:  # now, while a pixel is one byte
            images = images.contiguous(memory_format=torch.channels_last)
        return normalize(images, *_constants(self.mean, self.std, images.device))


@lru_cache
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    return torch.tensor(mean, device=device), torch.tensor(std, device=device)


def channel_statistics(train_images: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation of each channel, on the scale 0 to 1.

    Args:
        train_images: uint8 images, NCHW.

    Returns:
        Mean and standard deviation, float32, one value per channel.
    """
    # Counts of the 256 values are exact and need no float copy of the images.
    counts = torch.stack(
        [torch.bincount(c.flatten(), minlength=256) for c in train_images.unbind(1)]
    ).double()
    shares = counts / counts.sum(1, keepdim=True)
    values = torch.arange(256, device=shares.device, dtype=torch.float64) / 255
    mean = shares @ values
    variance = (shares * (values - mean[:, None]) ** 2).sum(1)
    return mean.float(), variance.sqrt().float()


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn uint8 images into float32 with mean 0 and standard deviation 1 per channel.

    Args:
        images: uint8 images, NCHW.
        mean: Mean of each channel on the scale 0 to 1.
        std: Standard deviation of each channel; a constant channel may have 0.

    Returns:
        float32 images of the same shape.
    """
    # One grey level at least, so that a constant channel becomes 0 and not NaN.
    scale = std.clamp_min(1 / 255)
    return (images.float() / 255 - mean[:, None, None]) / scale[:, None, None]


def augment(
    images: Tensor, generator: torch.Generator, padding: int = 4, flip: bool = True
) -> Tensor:
    """Crop each image at its own random place in a zero-padded copy, and mirror half of them.

    Args:
        images: uint8 images, NCHW.
        generator: Source of the random numbers; may be on another device than the images.
        padding: Pixels of zeros on each side.
        flip: Mirror each image left to right with probability 1/2.

    Returns:
        Images of the same shape.
    """
    count, _, height, width = images.shape
    drawn_on = generator.device
    places = torch.randint(2 * padding + 1, (2, count), generator=generator, device=drawn_on)
    top, left = _without_waiting(places, images.device)
    padded = transforms.pad(images, [padding] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: N, C, top, left, H, W
    images = windows[torch.arange(count, device=images.device), :, top, left]
    if not flip:
        return images
    drawn = torch.rand(count, generator=generator, device=drawn_on)
    mirrored = _without_waiting(drawn, images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], transforms.horizontal_flip(images), images)


def _without_waiting(values: Tensor, device: torch.device) -> Tensor:
    """Values on a device; the processor goes on while they are copied."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()  # a copy of other memory is waited for
    return values.to(device, non_blocking=True)


def augment_batch(config: Comparison, images: Tensor, generator: torch.Generator) -> Tensor:
    """Augment a training batch as the comparison asks for.

    Args:
        config: Options of the comparison.
        images: uint8 images, NCHW.
        generator: Source of the random numbers.

    Returns:
        Images of the same shape; the same object if nothing is to be done.
    """
    digits = config.data == "digits"  # 8 x 8 pixels, and a mirrored digit is no digit
    flip = config.flip and not digits
    if not config.augment or not (config.crop or flip):
        return images
    transform = transform_of(config)
    if transform is None:
        padding = (1 if digits else 4) if config.crop else 0
        return augment(images, generator, padding, flip)
    seeds = torch.randint(1 << 32, (len(images),), generator=generator).tolist()
    size = images.shape[-1]
    return torch.stack([transform(*one, size) for one in zip(images, seeds, strict=True)])


def transform_of(config: Comparison) -> Transform | None:
    """The user's own transform of training images, if there is one."""
    return None if config.transform is None else Transform(config.transform)
