"""The distributions whose negative log-likelihoods have names, and their Fisher information.

`cross_entropy`: a categorical distribution with the outputs as logits. `bernoulli`: independent
binary ones. `mse`: a Gaussian with the outputs for its mean and unit variance, so that the negative
log-likelihood of a sample is ½ Σ_k (z_k − y_k)².
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gradmask.errors import DataError, OptionError, check_choice

Loss = str | Callable[[Any, Any], Tensor]
LOSSES = ("cross_entropy", "bernoulli", "mse")
KINDS = ("empirical", "sampled", "exact")
IGNORED = -100  # PyTorch's label of positions that do not count


def check_likelihood(kind: str, loss: Loss | None) -> None:
    """Raise an error unless this kind of Fisher information can be had from this loss.

    Args:
        kind: `empirical`, `sampled` or `exact`.
        loss: `cross_entropy`, `bernoulli`, `mse` or a callable; None for a name that the data say.

    Raises:
        OptionError: If a name is unknown, or the model's distribution is needed but not known.
    """
    check_choice("kind", kind, KINDS)
    if isinstance(loss, str):
        check_choice("loss", loss, LOSSES)
    elif loss is None:
        return
    elif not callable(loss):
        raise OptionError(f"loss={loss!r} must be a name ({', '.join(LOSSES)}) or a callable.")
    elif kind != "empirical":
        raise OptionError(
            f"kind={kind!r} needs the model's own distribution, but the one behind a callable "
            "loss is not known. Use loss='cross_entropy', 'bernoulli' or 'mse', or "
            "kind='empirical'."
        )


def classes_last(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits with the classes in the last dimension."""
    dimension = class_dimension(logits, targets)  # checks first that these are logits
    return logits.movedim(dimension, -1)


def class_dimension(logits: Tensor, targets: Tensor) -> int:
    """The dimension of the classes, 1 or -1.

    (N, C, ...) is PyTorch's layout, (N, ..., C) that of language models; the targets' shape
    tells them apart.

    Args:
        logits: The model's outputs.
        targets: Their targets.

    Raises:
        DataError: If the two do not fit each other.
    """
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        raise DataError(
            "loss='cross_entropy' needs the model's output to be logits of shape (samples, "
            "classes, ...); for a single logit use loss='bernoulli', else pass a callable."
        )
    if targets.is_floating_point():  # probabilities
        if targets.shape == logits.shape:
            return 1
    elif targets.shape == (logits.shape[0], *logits.shape[2:]):
        return 1
    elif targets.shape == logits.shape[:-1]:
        return -1
    raise DataError(
        f"Targets of shape {tuple(targets.shape)} and type {targets.dtype} do not fit logits of "
        f"shape {tuple(logits.shape)}: expected integers of shape (N,) for (N, C), or (N, ...) for "
        "(N, C, ...) or (N, ..., C), or probabilities of the logits' shape."
    )


def check_labels(targets: Tensor, classes: int) -> None:
    """Raise a DataError unless all labels that count are in 0 to classes - 1."""
    labels = targets[~ignored(targets)]
    if labels.numel() and (labels.min() < 0 or labels.max() >= classes):
        raise DataError(
            f"Labels range from {int(labels.min())} to {int(labels.max())}, but the model has "
            f"{classes} classes: expected 0 to {classes - 1}."
        )


def ignored(targets: Tensor) -> Tensor:
    """Where integer targets do not count; unsigned ones cannot hold the mark."""
    return targets.long() == IGNORED


def _check_shapes(outputs: Any, targets: Tensor, loss: str, kind: str) -> None:
    """Raise a DataError unless outputs have the targets' shape, but for dimensions of one."""
    if not isinstance(outputs, Tensor) or outputs.squeeze().shape != targets.squeeze().shape:
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise DataError(
            f"loss={loss!r} needs the model's output to be {kind} of the targets' shape: found "
            f"{found} and {tuple(targets.shape)}."
        )


def check_binary(outputs: Any, targets: Tensor) -> None:
    """Raise a DataError unless outputs are logits of the targets' shape, and targets in [0, 1]."""
    _check_shapes(outputs, targets, "bernoulli", "logits")
    if targets.numel() and (targets.min() < 0 or targets.max() > 1):
        raise DataError(
            f"Targets range from {targets.min().item():g} to {targets.max().item():g}, but "
            "loss='bernoulli' expects 0 to 1."
        )


def check_means(outputs: Any, targets: Tensor) -> None:
    """Raise a DataError unless outputs are means of the targets' shape."""
    _check_shapes(outputs, targets, "mse", "a tensor")


class NotFiniteError(DataError):
    """The loss is NaN or infinite."""


def not_finite(value: float) -> NotFiniteError:
    """What to say of a loss that is NaN or infinite."""
    return NotFiniteError(
        f"The loss of a batch is {value}: check the inputs for NaN or infinity, and "
        "that training has not diverged (a lower learning rate)."
    )


def draw_directions(
    outputs: Tensor, targets: Tensor, loss: Loss, generator: torch.Generator
) -> Tensor:
    """Draw a direction v in the logits of each sample, with E[v vᵀ] = diag p − p pᵀ.

    That is the Fisher information of the labels in the logits, so (∂⟨z, v⟩ / ∂θ)² has the Fisher
    diagonal for its mean, as the squared gradient at a drawn label has. But for a network that is
    sure of its predictions, all but few draws of a label give next to nothing and those few nearly
    all, while v = √p ∘ ξ − p ⟨√p, ξ⟩ with random signs ξ gives about the mean each time.

    The random numbers come from the CPU, so a seed gives the same draw on every device.

    Args:
        outputs: Logits.
        targets: The data's targets, for their layout and ignored positions.
        loss: `cross_entropy`, `bernoulli` or `mse`, where v = ξ.
        generator: CPU generator.

    Returns:
        Directions, of the shape of the logits; zero at ignored positions.
    """
    if loss == "mse":
        check_means(outputs, targets)
        return _signs(outputs.detach(), generator)
    if loss == "bernoulli":
        check_binary(outputs, targets)
        logits = outputs.detach().double()
        deviation = (logits.sigmoid() * (-logits).sigmoid()).sqrt()
        return (deviation * _signs(deviation, generator)).to(outputs.dtype)
    logits = classes_last(outputs, targets).detach().double()
    found = direction(logits.softmax(-1), _signs(logits, generator))
    if not targets.is_floating_point():
        found = found * ~ignored(targets).unsqueeze(-1)
    return found.movedim(-1, class_dimension(outputs, targets)).to(outputs.dtype)


def direction(p: Tensor, signs: Tensor) -> Tensor:
    """√p ∘ ξ − p ⟨√p, ξ⟩, along the last dimension."""
    rooted = p.sqrt() * signs
    return rooted - p * rooted.sum(-1, keepdim=True)


def directional(outputs: Tensor, directions: Tensor) -> Tensor:
    """Σ ⟨z, v⟩ over samples and positions; logits of −∞ have no weight in a direction."""
    return (outputs.masked_fill(directions == 0, 0.0) * directions).sum()


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(2, like.shape, generator=generator, device="cpu")
    return (2 * bits - 1).to(like)


def exact_terms(outputs: Tensor, targets: Tensor, loss: Loss) -> Iterator[Tensor]:
    """Scalars whose squared per-sample gradients add up to the expectation over all labels.

    For every position and class c: Σ_n √p_nc · (−log p_nc). Labels at different positions are
    independent given the logits, so the squares add without cross terms. For `mse` the Fisher
    information of the outputs is the identity: Σ_n z_nk for every output k.

    Args:
        outputs: Logits, or means.
        targets: The data's targets, for their layout and ignored positions.
        loss: `cross_entropy`, `bernoulli` or `mse`.

    Yields:
        One scalar for each position and class (or, for `bernoulli` and `mse`, each output).

    Raises:
        DataError: If targets do not fit the outputs, or the outputs are not finite.
    """
    if loss == "mse":
        check_means(outputs, targets)
        means = outputs.reshape(len(targets), -1)
        if not means.isfinite().all():
            raise not_finite(math.nan)
        yield from means.sum(0)
        return
    if loss == "bernoulli":
        check_binary(outputs, targets)
        logits = outputs.reshape(len(targets), -1)
        if not logits.isfinite().all():
            raise not_finite(math.nan)
        weights = (logits.sigmoid() * (-logits).sigmoid()).detach().sqrt()
        yield from (weights * logits).sum(0)
        return
    logits = classes_last(outputs, targets)
    log_p = logits.log_softmax(-1)
    if log_p.isnan().any():
        raise not_finite(math.nan)
    weights = (0.5 * log_p.detach()).exp()
    if not targets.is_floating_point():
        weights = weights * ~ignored(targets).unsqueeze(-1)
    yield from -(weights * log_p).sum(0).reshape(-1)
