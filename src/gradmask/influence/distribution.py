"""A model's outputs as distributions, and how far two of them are apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradmask.errors import DataError
from gradmask.fisher.likelihood import check_binary, check_labels, check_means, class_dimension


@dataclass(frozen=True)
class Head:
    """Where in the outputs the classes are; positions (tokens, pixels, binary outputs) the rest.

    Attributes:
        loss: `cross_entropy`, `bernoulli` or `mse`.
        dimension: Dimension of the classes in outputs of shape (N, C, ...) or (N, ..., C).
    """

    loss: str
    dimension: int

    def logits(self, outputs: Tensor) -> Tensor:
        """Class logits (N, positions, classes) in float64; a binary logit z has classes 0 and z.

        For `mse` the means (N, outputs, 1).
        """
        outputs = outputs.double()
        if self.loss == "mse":
            return outputs.reshape(len(outputs), -1, 1)
        if self.loss == "bernoulli":
            z = outputs.reshape(len(outputs), -1)
            return torch.stack([torch.zeros_like(z), z], -1)
        logits = outputs.movedim(self.dimension, -1)
        return logits.reshape(len(logits), -1, logits.shape[-1])

    def blank_targets(self, outputs: Tensor) -> Tensor:
        """Targets of the right form for these outputs, at all positions."""
        if self.loss in ("bernoulli", "mse"):
            return torch.zeros_like(outputs)
        return torch.zeros_like(outputs.select(self.dimension, 0), dtype=torch.long)

    def divergence(self, logits: Tensor, others: Tensor) -> Tensor:
        """KL(p ‖ q) of each sample, from what `logits` gave (equation 3)."""
        if self.loss == "mse":
            return 0.5 * (logits - others).square().sum((-2, -1))
        return divergence(logits, others)

    def variance(self, logits: Tensor, changes: Tensor) -> Tensor:
        """vᵀ I v for changes v of the logits and the Fisher information I of the outputs."""
        if self.loss == "mse":
            return changes.square().sum((-2, -1))
        return variance(logits, changes)


def find_head(outputs: Tensor, targets: Tensor, all_targets: Tensor, loss: str) -> Head:
    """Tell the layout of the outputs from some samples, and check the labels of all.

    Args:
        outputs: Outputs for some samples.
        targets: Their targets.
        all_targets: Targets of all samples.
        loss: `cross_entropy`, `bernoulli` or `mse`.

    Raises:
        DataError: If targets do not fit the outputs or are out of range.
    """
    if loss == "mse":
        check_means(outputs, targets)
        return Head(loss, -1)
    if loss == "bernoulli":
        check_binary(outputs, targets)
        if all_targets.min() < 0 or all_targets.max() > 1:
            raise DataError(
                f"Targets range from {all_targets.min().item():g} to "
                f"{all_targets.max().item():g}, but loss='bernoulli' expects 0 to 1."
            )
        return Head(loss, -1)
    dimension = class_dimension(outputs, targets)
    if outputs.shape[dimension] == 1:
        raise DataError(
            "The model has one output, so with loss='cross_entropy' its one class is certain: use "
            "loss='bernoulli' for a binary logit."
        )
    if not targets.is_floating_point():
        check_labels(all_targets, outputs.shape[dimension])
    return Head(loss, dimension)


def check_layouts(loss: str, outputs: Tensor, others: Tensor) -> None:
    """Refuse logits (N, T, C) of which some have as many positions as classes and look otherwise.

    Args:
        loss: The loss.
        outputs: Outputs for a source.
        others: Outputs for a probe sample.

    Raises:
        DataError: If it is so.
    """
    if loss != "cross_entropy" or outputs.dim() < 3 or others.dim() != outputs.dim():
        return
    square, other = sorted((outputs, others), key=lambda o: o.shape[1] != o.shape[-1])
    classes = square.shape[1]
    if classes == square.shape[-1] == other.shape[-1] != other.shape[1]:
        raise DataError(
            f"Logits of shape {tuple(square.shape)} have as many positions as classes, and others "
            f"{tuple(other.shape)} the classes last, so which is which cannot be told: give logits "
            "as (samples, classes, positions)."
        )


def divergence(logits: Tensor, others: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_c q_c − p_c − p_c log(q_c / p_c), summed over positions, in nats (equation 3).

    The first two terms add up to zero. With them every term is p φ(log q − log p) with
    φ(d) = exp(d) − 1 − d ≥ 0, so that nothing cancels where q is close to p.

    Args:
        logits: Of p, shape (n, positions, classes).
        others: Of q, the same shape.

    Returns:
        Shape (n,), not negative.
    """
    log_p = logits.log_softmax(-1)
    log_q = others.log_softmax(-1)
    p, d = log_p.exp(), log_q - log_p
    phi = d.expm1() - d
    return torch.where(p > 0, p * phi, log_q.exp()).sum((-2, -1))


def variance(logits: Tensor, changes: Tensor) -> Tensor:
    """vᵀ(diag p − ppᵀ)v = Σ_c p_c (v_c − Σ_k p_k v_k)², summed over positions.

    Args:
        logits: Of p, shape (n, positions, classes).
        changes: The logits' changes v, the same shape.

    Returns:
        Shape (n,), not negative.
    """
    p = logits.softmax(-1)
    v = torch.where(p > 0, changes, 0.0)  # a logit of −∞ may have no derivative
    centred = v - (p * v).sum(-1, keepdim=True)
    return (p * centred.square()).sum((-2, -1))
