"""Transforms of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gradmask.errors import OptionError
from gradmask.named import named
from gradmask.seeding import own_random_state


@dataclass(frozen=True)
class Transform:
    """A function of one image, with random numbers of its own.

    It is called with each image alone, because torchvision's transforms draw once for a batch.

    Attributes:
        name: Its name, `module:function`.
    """

    name: str

    def __call__(self, image: Tensor, seed: int, size: int) -> Tensor:
        """Change an image.

        Args:
            image: uint8 (channels, height, width).
            seed: Seeds PyTorch's, NumPy's and Python's random numbers for this image.
            size: Height and width that are wanted.

        Returns:
            uint8 (channels, size, size).

        Raises:
            OptionError: If the function fails, or returns something else.
        """
        wanted = torch.Size((len(image), size, size))
        function = self._function  # before: a module may draw as it is imported
        with own_random_state("transform", seed):
            try:
                found = function(image)
            except Exception as error:  # of the user's code
                raise OptionError(
                    f"transform={self.name!r} fails for an image {_words(image)}: "
                    f"{type(error).__name__}: {error}"
                ) from error
        if not isinstance(found, Tensor) or found.dtype != torch.uint8 or found.shape != wanted:
            raise OptionError(
                f"transform={self.name!r} must return a tensor {tuple(wanted)} of torch.uint8, and "
                f"returned {_words(found)} for {_words(image)}: it is scaled and normalised "
                "afterwards."
            )
        return found

    def check(self, image: Tensor, size: int) -> None:
        """Check before training that it works, and that its random numbers are fixed by a seed.

        Raises:
            OptionError: If they are not.
        """
        first, second = (self(image, 0, size) for _ in range(2))
        if not torch.equal(first, second):
            raise OptionError(
                f"transform={self.name!r} draws random numbers that a seed does not fix: take "
                "those of torch, numpy.random or random."
            )

    @cached_property
    def _function(self) -> Any:
        return named("transform", self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name,)  # a worker finds the function itself


def _words(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"{tuple(found.shape)} of {found.dtype}"
    return f"an object of type {type(found).__name__}"
