"""Whether saved masks fit a model, and where they belong in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradmask.distributed import is_sharded, local, shard_like, take_shard
from gradmask.errors import StateError


def check_state(state: Any, options: Mapping[str, Any]) -> None:
    """Check that this is the state of a mask with the same options.

    Args:
        state: What is to be loaded.
        options: The mask's options by name.

    Raises:
        StateError: If it is of another version or other options, or damaged.
    """
    if not isinstance(state, dict) or state.get("version") != 1:
        raise StateError("This is not the state of a FisherMask that this version can read.")
    missing = {*options, "refreshes", "masks"} - state.keys()
    if missing:
        raise StateError(f"The state lacks {', '.join(sorted(missing))}: the file is damaged.")
    for name, value in options.items():
        if state[name] != value:
            raise StateError(
                f"The state was saved with {name}={state[name]!r}, but this mask has "
                f"{name}={value!r}: build it with the same options."
            )
    masks, refreshes = state["masks"], state["refreshes"]
    sound = type(refreshes) is int and refreshes >= 0 and isinstance(masks, dict)
    if not sound or any(not isinstance(m, Tensor) or m.dtype != torch.bool for m in masks.values()):
        raise StateError("The state's masks or refresh count are damaged.")


def of_plain_model(masks: Any) -> Any:
    """Masks by the names of a plain model, also if these were those of a compiled one."""
    if not isinstance(masks, Mapping):
        return masks
    return {n.removeprefix("_orig_mod.") if isinstance(n, str) else n: m for n, m in masks.items()}


def check_masks(masks: Any, parameters: Mapping[str, nn.Parameter] | None = None) -> None:
    """Check that these are masks by name.

    Args:
        masks: What should be `{parameter name: bool tensor}`.
        parameters: The trainable parameters that they must be of, one each.

    Raises:
        StateError: If it is something else.
    """
    if not isinstance(masks, Mapping):
        raise StateError(
            f"Masks come as {{parameter name: bool tensor}}, not as a {type(masks).__name__}."
        )
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            what = f"{mask.dtype}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise StateError(
                f"The mask of {name!r} is {what}: give a bool tensor, True where it learns."
            )
    if parameters is None:
        return
    if missing := sorted(parameters.keys() - masks.keys()):
        raise StateError(
            f"There is no mask for {', '.join(missing[:5])}: give one (of ones, to learn), or "
            "freeze the parameter (requires_grad=False)."
        )
    check_shapes(masks, parameters, "mask")


def check_shapes(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], what: str
) -> None:
    """Check that there is a tensor for each parameter, of its shape.

    Args:
        tensors: The tensors by name.
        parameters: Trainable parameters by name.
        what: What the tensors are, for the message.

    Raises:
        StateError: If a name or a shape differs.
    """
    if tensors.keys() != parameters.keys():
        odd = sorted(str(name) for name in tensors.keys() ^ parameters.keys())
        raise StateError(
            f"The {what} and the model's trainable parameters differ: {', '.join(odd[:5])}."
        )
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise StateError(
                f"The {what} has shape {tuple(tensors[name].shape)} for {name!r}, the model "
                f"{tuple(parameter.shape)}."
            )


def placed(mask: Tensor, parameter: nn.Parameter) -> Tensor:
    """A copy of a mask where and as its parameter is; a whole one is cut to the shards.

    Args:
        mask: The mask.
        parameter: Its parameter, of the same shape.

    Returns:
        The copy.

    Raises:
        StateError: If the mask is in shards, and the parameter is not.
    """
    if is_sharded(mask) and not is_sharded(parameter):
        raise StateError(
            "The state's masks are in shards, and the model is not: load it into a model with "
            "fully_shard, or save it whole (mask.full_tensor())."
        )
    part = local(mask) if is_sharded(mask) else take_shard(mask, parameter)
    return shard_like(part.to(parameter.device, copy=True), parameter)
