"""The public function: lengths of per-sample gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradmask.distributed import with_whole_parameters
from gradmask.fisher.adapter import Unpack, check_unpack
from gradmask.fisher.likelihood import Loss, check_likelihood
from gradmask.fisher.losses import standard_loss
from gradmask.fisher.reference import zero_squares
from gradmask.fisher.verify import Verify, check_verify
from gradmask.influence.forms import source_squares
from gradmask.influence.problem import Problem, check_memory, guarded, precision
from gradmask.measuring import measuring
from gradmask.parameters import trainable_parameters


def gradient_norms(
    model: nn.Module,
    samples: Any,
    *,
    loss: Loss | None = None,
    memory: int = 1 << 30,
    verify: Verify = "spread",
    unpack: Unpack | None = None,
) -> Tensor:
    """‖g_i‖, the length of the gradient of each sample's loss by all trainable parameters.

    The model runs in eval mode and is left as it was, as by `influence`.

    Args:
        model: Any module that treats its samples (dimension 0) independently in eval mode.
        samples: `(inputs, targets)` of n samples, as the sources of `influence`.
        loss: `cross_entropy`, `bernoulli` or a callable `(outputs, targets)`; summed over the
            positions of a sample. Default as for `influence`.
        memory: Bytes that gradients and activations may take at a time, about.
        verify: What is checked against samples alone: `spread` (some, at growing intervals), `all`
            or False.
        unpack: From samples of another form to `(inputs, targets)`.

    Returns:
        Shape (n,), in the parameters' precision (float32 for half-precision parameters).

    Raises:
        OptionError: If an option is unknown or out of range.
        ModelError: If the model has nothing to train, mixes samples by batch statistics, or is in
            shards.
        DataError: If there are no samples, labels are out of range, or the loss is not finite.
    """
    check_likelihood("empirical", loss := standard_loss(loss))
    check_memory(memory)
    check_verify(verify)
    check_unpack(unpack)
    model = with_whole_parameters(model)
    parameters = trainable_parameters(model, loss)
    ones = {name: torch.ones_like(zero_squares(p)) for name, p in parameters.items()}
    # The samples stand in for the probe set too, which a norm does without.
    data: dict[str, Any] = {"sources": samples, "probe": samples, "labelled": True}
    data["unpack"] = unpack

    def squares(problem: Problem) -> Tensor:
        return source_squares(problem, ones)

    with measuring(model, parameters.values(), loss):
        found = guarded(squares, model, parameters, loss=loss, memory=memory, verify=verify, **data)
    return found.sqrt().to(precision(parameters))
