"""Notice weights that changed where no masked step ran, by a checksum of their bits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from gradmask.distributed import local
from gradmask.errors import OptimizerError

_CHUNK = 1 << 18
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd, so that multiplying modulo 2⁶⁴ loses nothing; from the fractions of the golden ratio and √2.
_FACTORS = (0x9E3779B97F4A7C15 - (1 << 64), 0x6A09E667F3BCC909)
ON_PURPOSE = (
    "If you changed them on purpose (loaded others), call mask.detach() and then "
    "mask.attach(optimizer) afterwards."
)


@torch.no_grad()
def checksum(tensor: Tensor, mask: Tensor | None = None) -> int:
    """An exact sum of the bits of a tensor, each entry times an odd number that its place gives.

    It depends on the values and their places alone: not on device, memory layout or threads. A
    change of one entry always changes it, one of several all but certainly (2⁻³² or less).

    Args:
        tensor: Any dense tensor.
        mask: Leave out the entries where this bool tensor of the same shape is True.

    Returns:
        The sum, modulo 2⁶⁴. 0 and -0 count alike.
    """
    return int(_checksum(tensor, mask))


def _checksum(tensor: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same where the tensor is: a step does not wait for its device."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
        mask = None if mask is None else mask.unsqueeze(-1).expand(tensor.shape)
    word = _WORDS[tensor.element_size()]
    bits = tensor.detach().reshape(-1).view(word)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64, copy=True)
        part.masked_fill_(part == torch.iinfo(word).min, 0)  # of floating-point numbers: -0
        if mask is not None:
            part.masked_fill_(mask.reshape(-1)[start : start + _CHUNK], 0)
        if word == torch.int64:  # signs alone, in the highest bit, would cancel in pairs
            part = (part << 32) | (part >> 32 & 0xFFFFFFFF)
        part *= _multipliers(bits.device)[: len(part)]
        total = total * _FACTORS[0] + part.sum()
    return total


@lru_cache(maxsize=8)
def _multipliers(device: torch.device) -> Tensor:
    """Odd numbers without a pattern, one for each place."""
    with torch.inference_mode(False):
        places = torch.arange(1, _CHUNK + 1, device=device) * _FACTORS[0]
        return (places ^ (places >> 29)) * _FACTORS[1] | 1


class Print(NamedTuple):
    """Fingerprint of a parameter's entries: of all, or of those that a mask keeps from moving."""

    dtype: torch.dtype
    shape: torch.Size
    mask: Tensor
    weights: Tensor


@torch.no_grad()
def fingerprint(parameter: Tensor, mask: Tensor | None = None) -> Print:
    """Fingerprint of the part of a parameter that this rank has.

    Args:
        parameter: The parameter.
        mask: Its mask, to count masked entries only.

    Returns:
        The fingerprint.
    """
    own = local(parameter.detach())
    if mask is None:
        return Print(own.dtype, own.shape, torch.zeros((), device="cpu"), _checksum(own))
    kept = local(mask).to(own.device, non_blocking=True)
    return Print(own.dtype, own.shape, _checksum(kept), _checksum(own, kept))


class WeightWatch:
    """What is known of weights since the mask was made: as they were, and whose steps were masked.

    A weight whose optimizer never ran a masked step must be as it was. With `hold`, masked weights
    must be as they were before the first of these steps (not since the mask was made: other
    weights may be loaded until then).

    Args:
        hold: Whether masked weights may not move in masked steps either (`scope="update"`).
    """

    def __init__(self, hold: bool) -> None:
        self.hold = hold
        self.on = False
        self._made: dict[str, Print] = {}
        self._held: dict[str, Print] = {}
        self._stepped: dict[str, ref[nn.Parameter]] = {}

    def forget(self) -> None:
        """Know nothing: weights may be anything from now to the next step."""
        for known in (self._made, self._held, self._stepped):
            known.clear()

    def start(self, prints: Mapping[str, Print]) -> None:
        """Take parameters as they are now for those to compare with.

        Args:
            prints: Their fingerprints by name, of all entries.
        """
        self.on = True
        self._made.update(prints)
        for name in prints:
            self._held.pop(name, None)
            self._stepped.pop(name, None)

    def step(self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        """Note that a masked step of these begins.

        Args:
            parameters: Masked parameters of one optimizer.
            masks: The masks.
        """
        for name, parameter in parameters.items():
            if self.hold and name not in self._held:
                self._held[name] = fingerprint(parameter, masks[name])
            if name not in self._stepped or self._stepped[name]() is not parameter:
                self._stepped[name] = ref(parameter)

    def check(
        self,
        parameters: Mapping[str, nn.Parameter],
        masks: Mapping[str, Tensor],
        holders: Mapping[int, Collection[str]],
    ) -> None:
        """Raise an error if weights changed where the mask could not hold them.

        Args:
            parameters: The model's parameters.
            masks: The masks.
            holders: Types of the attached optimizers that hold a parameter, by its id.

        Raises:
            OptimizerError: If some did.
        """
        for name, parameter in parameters.items() if self.on else ():
            if name not in masks:
                continue
            ran = name in self._stepped and self._stepped[name]() is parameter
            if name in self._held:
                changed = _differ(self._held[name], parameter, masks[name])
            else:
                changed = not ran and name in self._made and _differ(self._made[name], parameter)
            if not changed:
                continue
            if not ran and id(parameter) not in holders:
                raise OptimizerError(
                    f"The weights of {name!r} changed, and no optimizer that the mask is attached "
                    "to holds them, so they were not masked: call mask.attach(optimizer) with the "
                    f"one that does, as soon as it is built. {ON_PURPOSE}"
                )
            if not ran:
                kinds = " or ".join(dict.fromkeys(holders[id(parameter)]))
                raise OptimizerError(
                    f"The weights of {name!r} changed, and no step() of {kinds} ran, so they were "
                    "not masked: move them with step(), or attach the mask to the optimizer inside "
                    "whose step() does (such as mask.attach(optimizer.base_optimizer)). "
                    f"{ON_PURPOSE}"
                )
            raise OptimizerError(
                f"Masked weights of {name!r} moved between the optimizer's steps, where "
                "scope='update' cannot hold them (averaging, Lookahead, clamping, another "
                f"optimizer): do that inside step(), or use scope='gradient'. {ON_PURPOSE}"
            )

    def __getstate__(self) -> dict[str, Any]:
        """References to parameters as parameters, to be copied together with the model."""
        stepped = {name: found() for name, found in self._stepped.items()}
        return vars(self) | {"_stepped": {n: p for n, p in stepped.items() if p is not None}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._stepped = {name: ref(p) for name, p in state["_stepped"].items()}


def _differ(before: Print, parameter: Tensor, mask: Tensor | None = None) -> bool:
    own = local(parameter.detach())
    if own.shape != before.shape:
        return True
    if own.dtype != before.dtype or (mask is not None and local(mask).shape != own.shape):
        return False  # converted (`model.half()`), or another mask: they cannot be compared
    now = fingerprint(parameter, mask)
    return int(now.mask) == int(before.mask) and int(now.weights) != int(before.weights)
