"""From what the user gives to a setting: data checked, blocks sized, ways found out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradmask.containers import map_tensors, part, sample_count, tensors_in
from gradmask.errors import DataError
from gradmask.fisher.batch import safe_ways, unpack
from gradmask.fisher.likelihood import Loss
from gradmask.fisher.reference import call
from gradmask.fisher.verify import Verify, computed_in
from gradmask.influence.distribution import find_head
from gradmask.influence.guard import Guard, Parameters, Refuted
from gradmask.influence.samples import Samples, activation_bytes
from gradmask.influence.setting import Setting

logger = logging.getLogger("gradmask")


def prepare(
    model: nn.Module,
    parameters: Parameters,
    sources: Any,
    probe: Any,
    *,
    labelled: bool,
    loss: Loss,
    memory: int,
    alone: set[str],
    verify: Verify,
) -> Setting:
    """Check the data and find out what the model needs.

    Args:
        model: The model, in eval mode.
        parameters: Its trainable parameters.
        sources: `(inputs, targets)`.
        probe: Inputs, or `(inputs, targets)` if `labelled`.
        labelled: Whether the probe has targets.
        loss: The negative log-likelihood.
        memory: Bytes.
        alone: Names that are measured with the whole model, one sample at a time.
        verify: How gradients are checked.

    Raises:
        DataError: If data are empty or of a wrong form, or labels out of range.
    """
    device = next(iter(parameters.values())).device
    inputs, targets = _labelled("sources", sources, device)
    probe_inputs, probe_targets = (
        _labelled("probe", probe, device) if labelled else (_unlabelled(probe, device), None)
    )
    first, activation = activation_bytes(model, inputs)
    try:
        example, other = activation_bytes(model, probe_inputs)
    except TypeError as error:
        if labelled or not isinstance(probe, tuple | list):
            raise
        raise DataError(
            f"The model does not take the {len(probe)} parts of the probe as its inputs ({error}): "
            "give inputs alone, or (inputs, targets) with fisher='empirical'."
        ) from error
    head = None
    if isinstance(loss, str):
        head = find_head(first, targets[:1], targets, loss)
        if probe_targets is not None:
            find_head(example, probe_targets[:1], probe_targets, loss)

    def samples(data: Any, labels: Tensor | None, count: int) -> Samples:
        guard = Guard(parameters, alone, verify)
        ways = safe_ways(model, data, guard.fast) if count > 1 else None
        return Samples(data, labels, count, loss, guard, ways)

    setting = Setting(
        model,
        parameters,
        loss,
        head,
        samples(inputs, targets, len(targets)),
        samples(probe_inputs, probe_targets, sample_count(probe_inputs)),
        memory,
        max(activation, other),
        map_tensors(lambda t: t.detach(), example),
    )
    if verify and _mixes(setting):
        return replace(setting, probe=replace(setting.probe, apart=True))
    return setting


def guarded(
    measure: Callable[[Setting], Tensor],
    model: nn.Module,
    parameters: Parameters,
    **options: Any,
) -> Tensor:
    """Measure something; again, in a safer way, if the check of single samples fails.

    Args:
        measure: What is measured, from a setting.
        model: The model, in eval mode.
        parameters: Its trainable parameters.
        options: Those of `prepare`.
    """
    alone: set[str] = set()
    while True:
        try:
            return measure(prepare(model, parameters, alone=alone, **options))
        except Refuted:
            continue  # more is measured alone now


def _mixes(setting: Setting) -> bool:
    """Whether the outputs of the first probe sample depend on the batch that it is in."""
    columns = next(setting.probe.blocks(setting.together))
    if columns.stop == 1:
        return False
    with torch.no_grad():
        outputs = tensors_in(call(setting.model, part(setting.probe.inputs, columns)))
    pairs = zip(tensors_in(setting.example), outputs, strict=False)
    near = 1e-6 if computed_in(setting.parameters.values()) == torch.float64 else 1e-2
    for one, many in pairs:
        if one.is_floating_point() and one.dim() and one.shape[1:] == many.shape[1:]:
            a, b = one[0].double(), many[0].double()
            if (a - b).norm() > near * torch.maximum(a.norm(), b.norm()):
                logger.warning(
                    "The outputs of a sample depend on the batch that it is in: the probe set "
                    "runs one sample at a time, which is slow."
                )
                return True
    return False


def _labelled(name: str, data: Any, device: torch.device) -> tuple[Any, Tensor]:
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise DataError(
            f"The {name} are a {type(data).__name__}: expected one pair (inputs, targets); join "
            "the batches of a loader with torch.cat."
        )
    _check_some(name, sample_count(data))
    return unpack(data, device)


def _unlabelled(data: Any, device: torch.device) -> Any:
    _check_some("probe", sample_count(data))
    return unpack((data, torch.empty(sample_count(data), device=device)), device)[0]


def _check_some(name: str, count: int) -> None:
    if count == 0:
        raise DataError(f"The {name} set has no samples: give at least one, in dimension 0.")
