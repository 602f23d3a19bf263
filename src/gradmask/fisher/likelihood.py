"""The negative log-likelihood whose gradients make the Fisher information."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from gradmask.errors import DataError, OptionError, check_choice

Loss = str | Callable[[Any, Any], Tensor]
LOSSES = ("cross_entropy", "bernoulli")
KINDS = ("empirical", "sampled", "exact")
IGNORED = -100  # PyTorch's label of positions that do not count


def check_likelihood(kind: str, loss: Loss) -> None:
    """Raise an error unless this kind of Fisher information can be had from this loss.

    Args:
        kind: `empirical`, `sampled` or `exact`.
        loss: `cross_entropy`, `bernoulli` or a callable.

    Raises:
        OptionError: If a name is unknown, or the model's distribution is needed but not known.
    """
    check_choice("kind", kind, KINDS)
    if isinstance(loss, str):
        check_choice("loss", loss, LOSSES)
    elif kind != "empirical":
        raise OptionError(
            f"kind={kind!r} draws labels from the model, but the distribution behind a callable "
            "loss is not known. Use loss='cross_entropy' or 'bernoulli', or kind='empirical'."
        )


def part(batch: Any, which: slice) -> Any:
    """Samples `which` of every tensor in a nested batch."""
    return tree_map(lambda t: t[which] if isinstance(t, Tensor) and t.dim() else t, batch)


def _classes_last(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits with the classes in the last dimension.

    (N, C, ...) is PyTorch's layout, (N, ..., C) that of language models; the targets' shape
    tells them apart.
    """
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        raise DataError(
            "loss='cross_entropy' needs the model's output to be logits of shape (samples, "
            "classes, ...); for a single logit use loss='bernoulli', else pass a callable."
        )
    if targets.shape == logits.shape:  # probabilities as targets
        return logits.movedim(1, -1)
    if targets.shape == (logits.shape[0], *logits.shape[2:]):
        return logits.movedim(1, -1)
    if targets.shape == logits.shape[:-1]:
        return logits
    raise DataError(
        f"Targets of shape {tuple(targets.shape)} do not fit logits of shape "
        f"{tuple(logits.shape)}: expected (N,) for (N, C), or (N, ...) for (N, C, ...) "
        "or (N, ..., C)."
    )


def _check_labels(targets: Tensor, classes: int) -> None:
    labels = targets[targets != IGNORED]
    if labels.numel() and (labels.min() < 0 or labels.max() >= classes):
        raise DataError(
            f"Labels range from {int(labels.min())} to {int(labels.max())}, but the model has "
            f"{classes} classes: expected 0 to {classes - 1}."
        )


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    logits = _classes_last(logits, targets)
    if targets.is_floating_point():
        return -(targets.movedim(1, -1) * logits.log_softmax(-1)).sum()
    _check_labels(targets, logits.shape[-1])
    flat = logits.reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORED, reduction="sum")


def nll(outputs: Any, targets: Any, loss: Loss) -> Tensor:
    """Sum over the samples of the negative log-likelihood (equation 2), a scalar.

    A callable is called on one sample at a time, so that its reduction does not matter.

    Args:
        outputs: The model's outputs for N samples.
        targets: Their targets.
        loss: `cross_entropy`, `bernoulli` or a callable of `(outputs, targets)`.

    Returns:
        Scalar, the sum over samples (and, within a sample, over its positions).

    Raises:
        DataError: If targets do not fit the outputs, or the loss is not finite.
    """
    if loss == "cross_entropy":
        total = _cross_entropy(outputs, targets)
    elif loss == "bernoulli":
        targets = targets.reshape(outputs.shape).to(outputs.dtype)
        total = F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")
    else:
        assert not isinstance(loss, str)
        samples = [slice(n, n + 1) for n in range(len(targets))]
        total = torch.stack([loss(part(outputs, n), part(targets, n)).sum() for n in samples]).sum()
    value = total.item()
    if not math.isfinite(value):
        raise DataError(
            f"The loss of a batch is {value}: check the inputs for NaN or infinity, and "
            "that training has not diverged (a lower learning rate)."
        )
    return total


def draw_targets(
    outputs: Tensor, targets: Tensor, loss: Loss, generator: torch.Generator
) -> Tensor:
    """Draw labels from the model's own distribution, at the positions that count.

    The random numbers come from the CPU, so a seed gives the same draw on every device.

    Args:
        outputs: Logits.
        targets: The data's targets, for their layout and ignored positions.
        loss: `cross_entropy` or `bernoulli`.
        generator: CPU generator.

    Returns:
        Targets of the same shape as the data's.
    """
    if loss == "bernoulli":
        uniform = torch.rand(outputs.shape, generator=generator).to(outputs.device)
        return (uniform < outputs.detach().sigmoid()).to(outputs.dtype)
    logits = _classes_last(outputs, targets)
    cumulative = logits.detach().double().softmax(-1).cumsum(-1)
    uniform = torch.rand(cumulative.shape[:-1], generator=generator, dtype=torch.float64)
    labels = (cumulative < uniform.to(cumulative.device).unsqueeze(-1)).sum(-1)
    labels = labels.clamp_(max=logits.shape[-1] - 1)
    if not targets.is_floating_point():
        labels[targets == IGNORED] = IGNORED
    return labels


def exact_terms(outputs: Tensor, targets: Tensor, loss: Loss) -> Iterator[Tensor]:
    """Scalars whose squared per-sample gradients add up to the expectation over all labels.

    For every position and class c: Σ_n √p_nc · (−log p_nc). Labels at different positions are
    independent given the logits, so the squares add without cross terms.

    Args:
        outputs: Logits.
        targets: The data's targets, for their layout and ignored positions.
        loss: `cross_entropy` or `bernoulli`.

    Yields:
        One scalar for each position and class (or, for `bernoulli`, each output).
    """
    if loss == "bernoulli":
        logits = outputs.reshape(len(outputs), -1)
        weights = (logits.sigmoid() * (-logits).sigmoid()).detach().sqrt()
        yield from (weights * logits).sum(0)
        return
    logits = _classes_last(outputs, targets)
    log_p = logits.log_softmax(-1)
    weights = (0.5 * log_p.detach()).exp()
    if not targets.is_floating_point():
        weights = weights * (targets != IGNORED).unsqueeze(-1)
    yield from -(weights * log_p).sum(0).reshape(-1)
