"""Masks for PEFT's sparse adapters (SHiRA), which ships random ones only."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from gradmask.errors import DataError, ModelError, OptionError

MaskFunction = Callable[..., Tensor]


def shira_mask(model: nn.Module, scores: Mapping[str, Tensor]) -> MaskFunction:
    """Make the `mask_fn` of a `ShiraConfig`: in every layer the entries with the highest scores.

    SHiRA trains r (m + n) entries of a weight of shape (m, n), as many as LoRA has, so each layer
    has a threshold of its own. With equal scores the entry that comes first is taken.

    Example:
        ```python
        fisher = gradmask.fisher_diagonal(model, loader)
        config = peft.ShiraConfig(r=8, target_modules=["query", "value"], mask_type="fisher")
        config.mask_fn = shira_mask(model, fisher)
        model = peft.get_peft_model(model, config)
        ```

    Args:
        model: The model before `get_peft_model`.
        scores: `{parameter name: tensor of its shape}`, for example a Fisher diagonal.

    Returns:
        A function `(base_layer, r)` that gives zeros and ones, of the weight's shape and type.

    Raises:
        ModelError: From the function, if a layer is not the model's, or has no score.
        DataError: If a score has another shape than its parameter, or holds NaN.
        OptionError: From the function, if r needs more entries than a layer has.
    """
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        score = scores.get(name)
        if score is not None and score.shape != parameter.shape:
            raise DataError(
                f"The score of {name!r} has shape {tuple(score.shape)}, but the parameter "
                f"{tuple(parameter.shape)}: measure the scores on this model."
            )
        if score is not None and score.isnan().any():
            raise DataError(f"The score of {name!r} holds NaN.")

    def mask_fn(base_layer: nn.Module, r: int, **_: object) -> Tensor:
        weight = base_layer.weight
        assert isinstance(weight, Tensor)
        name = names.get(id(weight))
        if name is None or name not in scores:
            raise ModelError(
                f"There is no score for the weight of shape {tuple(weight.shape)} of a "
                f"{type(base_layer).__name__}"
                + (f" ({name})" if name else "")
                + ": give scores of all target modules, measured on the model that the adapter "
                "goes into, with requires_grad on."
            )
        count = r * sum(weight.shape)
        if count > weight.numel():
            raise OptionError(
                f"r={r} asks for {count} entries of {name!r}, which has {weight.numel()}: lower r."
            )
        order = scores[name].flatten().sort(descending=True, stable=True).indices[:count]
        mask = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
        mask[order.to(weight.device)] = 1
        return mask.view_as(weight)

    return mask_fn
