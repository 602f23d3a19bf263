"""Scores of samples by their gradients, at the weights that a model has now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Subset

import gradmask
from gradmask.errors import DataError, OptionError, check_choice
from gradmask.measuring import measuring

GRADIENT_SCORES = ("gradient_norm", "self_influence", "gradient_agreement", "influence")


def gradient_scores(
    model: nn.Module,
    dataset: Any,
    labels: Tensor,
    *,
    which: Sequence[str] = GRADIENT_SCORES[:3],
    probe: Any = None,
    step: float = 1e-3,
    batch_size: int = 128,
    collate_fn: Any = None,
) -> dict[str, Tensor]:
    """Scores of every sample by the gradient g of its cross-entropy, for `rank(..., extra=...)`.

    `gradient_norm` is ‖g‖, `self_influence` ½ ε² ‖g‖⁴ (equation 4 with the empirical Fisher
    information of the sample itself), `gradient_agreement` the cosine of g and the mean gradient of
    the other samples of its label, `influence` the mean of ½ ε² gᵀ F(x) g over the probe set.
    They find wrong labels worse than what training says of them does, and cost passes: see
    `docs/audit.md` for what they are good for.

    The model runs in eval mode and is left as it was.

    Args:
        model: A classifier that treats its samples (dimension 0) independently in eval mode.
        dataset: Map-style data set of `(input, label)` without augmentation, in the order of
            `labels`.
        labels: Given labels, shape (samples,).
        which: Names of the scores.
        probe: Inputs of a batch of probe samples, for `influence`.
        step: ε, the learning rate of the step.
        batch_size: Samples at a time.
        collate_fn: Makes a batch (default: as in a `DataLoader`).

    Returns:
        By name, shape (samples,), float64, on the CPU.

    Raises:
        OptionError: If a name is unknown, or the probe is missing.
        DataError: If there is not one label for each sample.
        ModelError: If the model cannot be measured.
    """
    for name in which:
        check_choice("score", name, GRADIENT_SCORES)
    if "influence" in which and probe is None:
        raise OptionError("influence is measured on others: give probe=, a batch of inputs.")
    labels = torch.as_tensor(labels)
    if len(labels) != len(dataset):
        raise DataError(f"{len(labels)} labels and {len(dataset)} samples: one for each.")
    found: dict[str, list[Tensor]] = {name: [] for name in which}
    device = next(model.parameters()).device

    def batches(indices: Sequence[int]) -> Any:
        loader = DataLoader(Subset(dataset, indices), batch_size=batch_size, collate_fn=collate_fn)
        for inputs, _ in loader:
            yield tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, inputs)

    # Label by label: a mean gradient is as large as the model, and one at a time is held.
    labels = labels.detach().cpu()
    order = labels.argsort(stable=True)
    for indices in order.split(labels.unique(return_counts=True)[1].tolist()):
        label = int(labels[indices[0]])
        norms = []
        for inputs in batches(indices.tolist()):
            samples = inputs, torch.full((_count(inputs),), label, device=device)
            norms.append(gradmask.gradient_norms(model, samples).double().cpu())
            if "influence" in which:
                values = gradmask.influence(model, samples, probe, step=step, fisher="sampled")
                found["influence"].append(values.double().cpu())
        norm = torch.cat(norms)
        if "gradient_agreement" in which:
            with measuring(model, model.parameters(), None):
                agreement = _agreement(model, partial(batches, indices.tolist()), label, norm)
            found["gradient_agreement"].append(agreement)
        for name, value in {
            "gradient_norm": norm,
            "self_influence": 0.5 * step**2 * norm**4,
        }.items():
            if name in which:
                found[name].append(value)
    return {name: torch.cat(values)[order.argsort()] for name, values in found.items()}


def _count(inputs: Any) -> int:
    return next(len(value) for value in tree_leaves(inputs) if isinstance(value, Tensor))


def _agreement(
    model: nn.Module, batches: Callable[[], Iterable[Any]], label: int, norms: Tensor
) -> Tensor:
    """Cosine of each sample's gradient and the sum of the others' of its label."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    for inputs in batches():
        losses = _losses(model, inputs, label)
        gradients = torch.autograd.grad(losses.sum(), parameters, materialize_grads=True)
        torch._foreach_add_(total, gradients)
    dots = []
    for inputs in batches():
        losses = _losses(model, inputs, label)
        weights = torch.ones_like(losses, requires_grad=True)
        # The derivative by a sample's weight of (Σ_i weight_i g_i) · total is g_i · total.
        gradients = torch.autograd.grad(
            losses @ weights, parameters, create_graph=True, materialize_grads=True
        )
        along = torch.stack([(g * t).sum() for g, t in zip(gradients, total, strict=True)]).sum()
        dots.append(torch.autograd.grad(along, weights)[0].double().cpu())
    dot = torch.cat(dots)
    square = sum(float(t.double().square().sum()) for t in total)
    others = (square - 2 * dot + norms**2).clamp_min(0).sqrt()
    length = norms * others
    return torch.where(length > 0, (dot - norms**2) / length, 0.0)


def _losses(model: nn.Module, inputs: Any, label: int) -> Tensor:
    if isinstance(inputs, Mapping):
        outputs = model(**inputs)
    else:
        outputs = model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
    logits = getattr(outputs, "logits", outputs)
    targets = torch.full((len(logits),), label, device=logits.device)
    return nn.functional.cross_entropy(logits, targets, reduction="none")
