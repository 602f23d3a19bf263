"""The parameters of a model and its loss that are measured and masked."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from gradmask.errors import ModelError


def named_parameters(model: nn.Module, loss: Any = None) -> dict[str, nn.Parameter]:
    """Return `{name: parameter}` of a model, and as `loss.<name>` those that only its loss has.

    Args:
        model: Any module.
        loss: A loss; its parameters count if it is a module.

    Returns:
        Each parameter once, under the first name it has.

    Raises:
        ModelError: If the model has another parameter of a name that one of the loss gets.
    """
    found = dict(model.named_parameters())
    known = {id(p) for p in found.values()}
    for name, parameter in loss.named_parameters() if isinstance(loss, nn.Module) else ():
        if id(parameter) in known:
            continue
        if f"loss.{name}" in found:
            raise ModelError(
                f"The model and the loss both have a parameter that would be named 'loss.{name}': "
                "rename the model's attribute `loss`."
            )
        found[f"loss.{name}"] = parameter
    return found


def trainable_parameters(model: nn.Module, loss: Any = None) -> dict[str, nn.Parameter]:
    """Return `{name: parameter}` of all parameters with `requires_grad`; tied ones appear once.

    Args:
        model: Any module.
        loss: A loss; its parameters count if it is a module.

    Returns:
        Trainable parameters under the names that `named_parameters` gives them.

    Raises:
        ModelError: If the model is scripted or frozen, or a lazy layer has no shape yet.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("The model is a ScriptModule, which takes no hooks: give the nn.Module.")
    parameters = {name: p for name, p in named_parameters(model, loss).items() if p.requires_grad}
    if not parameters:
        raise ModelError(
            "The model has no trainable parameters: set requires_grad=True on those that learn."
        )
    for name, parameter in parameters.items():
        if isinstance(parameter, UninitializedParameter):
            raise ModelError(f"Parameter {name!r} has no shape yet: run one batch first.")
    return parameters
