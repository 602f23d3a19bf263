"""The public function: lengths of per-sample gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradmask.distributed import with_whole_parameters
from gradmask.errors import check_choice
from gradmask.fisher.calls import full_precision
from gradmask.fisher.likelihood import LOSSES, Loss
from gradmask.influence.forms import source_squares
from gradmask.influence.setting import check_memory, precision, prepare
from gradmask.parameters import measuring, trainable_parameters


def gradient_norms(
    model: nn.Module, samples: Any, *, loss: Loss = "cross_entropy", memory: int = 1 << 30
) -> Tensor:
    """‖g_i‖, the length of the gradient of each sample's loss by all trainable parameters.

    The model runs in eval mode and is left as it was, as by `influence`.

    Args:
        model: Any module that treats its samples (dimension 0) independently in eval mode.
        samples: `(inputs, targets)` of n samples, as the sources of `influence`.
        loss: `cross_entropy`, `bernoulli` or a callable `(outputs, targets)`; summed over the
            positions of a sample.
        memory: Bytes that gradients and activations may take at a time, about.

    Returns:
        Shape (n,), in the parameters' precision (float32 for half-precision parameters).

    Raises:
        OptionError: If an option is unknown or out of range.
        ModelError: If the model has nothing to train, mixes samples by batch statistics, or is in
            shards.
        DataError: If there are no samples, labels are out of range, or the loss is not finite.
    """
    if isinstance(loss, str):
        check_choice("loss", loss, LOSSES)
    check_memory(memory)
    model = with_whole_parameters(model)
    parameters = trainable_parameters(model)
    with measuring(model, parameters.values()):
        # The samples stand in for the probe set too, which a norm does without.
        setting = prepare(
            model, parameters, samples, samples, labelled=True, loss=loss, memory=memory
        )
        ones = {name: full_precision(torch.ones_like(p)) for name, p in parameters.items()}
        squares = source_squares(setting, ones)
    return squares.sqrt().to(precision(parameters))
