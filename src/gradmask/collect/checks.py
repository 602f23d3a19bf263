"""What cannot be measured while it trains, and the way out of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradmask.distributed import is_compiled
from gradmask.errors import ModelError, first_names
from gradmask.parameters import trainable_parameters

INSTEAD = (
    "Measure in a pass of its own, in eval mode: mask.refresh(loader), or refresh='epoch' of a "
    "callback."
)


def check_model(model: nn.Module, loss: Any) -> None:
    """Refuse what no training pass can be measured of."""
    for name in trainable_parameters(model, loss):
        if name.startswith("loss.") and isinstance(loss, nn.Module):
            raise ModelError(f"The loss has parameters of its own ({name}). {INSTEAD}")
    for module in model.modules():
        if is_compiled(module):
            raise ModelError(
                f"{type(module).__name__} is compiled, which hides its layers while it trains: "
                f"leave torch.compile out. {INSTEAD}"
            )


def check_mode(model: nn.Module) -> None:
    """Refuse layers that mix the samples of a batch, as they are now."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ModelError(
                f"Layer {name!r} ({type(module).__name__}) normalises with the statistics of the "
                "batch while it trains, which mixes the samples: they have no gradients of their "
                f"own. {INSTEAD} Or use GroupNorm or LayerNorm, or keep the layer in eval mode."
            )


def check_handled(missing: Iterable[str]) -> None:
    """Refuse parameters that would need passes of their own."""
    if missing := set(missing):
        raise ModelError(
            f"No rule measures {first_names(missing)} in training's own pass: register one for the "
            f"layer (gradmask.fisher.register_rule), or freeze it. {INSTEAD}"
        )
