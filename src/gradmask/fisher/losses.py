"""What a loss is: a function of one sample's outputs and targets; checked on every batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmask.containers import part
from gradmask.errors import DataError, GradmaskError, ModelError
from gradmask.fisher.likelihood import (
    IGNORED,
    Loss,
    check_binary,
    check_labels,
    check_means,
    classes_last,
    directional,
    not_finite,
)


class WeightedCrossEntropy:
    """Σ over samples and positions of w_y · (−log p_y), whatever the reduction of the loss given.

    PyTorch's mean divides by the sum of the weights, so that of one sample alone its weight would
    cancel out.

    Args:
        function: `F.cross_entropy` or `F.nll_loss`.
        options: Its `weight`, `ignore_index` and `label_smoothing`.
    """

    def __init__(self, function: Any, options: Mapping[str, Any]) -> None:
        known = {"weight", "ignore_index", "label_smoothing"}
        self.function = function
        self.options = {k: v for k, v in options.items() if k in known and v is not None}

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        """The sum over samples; one with nothing but ignored positions adds 0."""
        options = dict(self.options)
        if isinstance(options.get("weight"), Tensor):
            options["weight"] = options["weight"].to(outputs)
        if isinstance(outputs, Tensor) and not targets.is_floating_point():
            outputs, ignored = classes_last(outputs, targets), options.get("ignore_index", IGNORED)
            targets = targets.masked_fill(targets == IGNORED, ignored)  # of what is no target
            counted = targets[targets.long() != ignored]
            check_labels(counted, outputs.shape[-1])
            outputs, targets = outputs.flatten(0, -2), targets.long().flatten()
        total: Tensor = self.function(outputs, targets, reduction="sum", **options)
        return total


def standard_loss(loss: Loss | None) -> Loss | None:
    """PyTorch's own weighted means as sums, and plain cross-entropy by its name.

    Args:
        loss: A name, a module such as `nn.CrossEntropyLoss(weight=...)`, another callable, or None.

    Returns:
        A name, a `WeightedCrossEntropy`, or what was given.
    """
    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        own = nn.CrossEntropyLoss if isinstance(loss, nn.CrossEntropyLoss) else nn.NLLLoss
        if type(loss).forward is not own.forward or loss._forward_hooks or loss._forward_pre_hooks:
            return loss
        function = F.cross_entropy if own is nn.CrossEntropyLoss else F.nll_loss
        options = {**vars(loss), "weight": loss.weight}
    elif (
        isinstance(loss, partial)
        and loss.func in (F.cross_entropy, F.nll_loss)
        and loss.keywords.get("weight") is not None
        and not (loss.args or {"size_average", "reduce"} & loss.keywords.keys())
    ):
        function, options = loss.func, loss.keywords
    else:
        return loss
    found = WeightedCrossEntropy(function, options)
    given = {"ignore_index": IGNORED, "label_smoothing": 0.0, **found.options}
    plain = given == {"ignore_index": IGNORED, "label_smoothing": 0.0}
    return "cross_entropy" if plain and function is F.cross_entropy else found


def takes_logits(loss: Any) -> bool:
    """Whether it is one of PyTorch's own losses, which take no outputs with logits inside."""
    return type(loss).__module__ == nn.CrossEntropyLoss.__module__


def likelihood_of(loss: Any) -> str | None:
    """The name of the likelihood whose logits and targets a loss takes, if it has one."""
    if isinstance(loss, WeightedCrossEntropy):
        return "cross_entropy"
    if isinstance(loss, str):
        return loss
    return {nn.BCEWithLogitsLoss: "bernoulli", nn.MSELoss: "mse"}.get(type(loss))


class Nll(NamedTuple):
    """A negative log-likelihood.

    Attributes:
        total: Scalar, the sum over the samples (and, within a sample, over its positions).
        empty: Samples with nothing left to score, whose gradient is zero.
    """

    total: Tensor
    empty: frozenset[int] = frozenset()


def nll(outputs: Any, targets: Any, loss: Loss, *, alone: bool = False) -> Nll:
    """Sum over the samples of the negative log-likelihood (equation 2), a scalar.

    A callable is called on one sample at a time, so that its reduction does not matter, and once
    on all: that must be the sum or the mean of the samples' values.

    Args:
        outputs: The model's outputs for N samples.
        targets: Their targets.
        loss: `cross_entropy`, `bernoulli`, `mse`, or a callable of `(outputs, targets)`.
        alone: The outputs are of one sample that went through the model by itself: a callable
            gets them whole, also what does not belong to samples.

    Raises:
        DataError: If targets do not fit the outputs, the loss is not finite, or it is not a sum or
            mean over its samples.
    """
    empty: frozenset[int] = frozenset()
    if loss == "cross_entropy":
        total = _cross_entropy(outputs, targets)
    elif loss is directional or isinstance(loss, WeightedCrossEntropy):
        total = loss(outputs, targets)
    elif loss == "bernoulli":
        check_binary(outputs, targets)
        targets = targets.reshape(outputs.shape).to(outputs.dtype)
        total = F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")
    elif loss == "mse":
        check_means(outputs, targets)
        total = 0.5 * (outputs - targets.reshape(outputs.shape).to(outputs.dtype)).square().sum()
    elif alone:
        total = _value(loss, outputs, targets)
        if total.isnan() and _all_ignored(targets):
            total = torch.zeros_like(total)
    else:
        assert not isinstance(loss, str)
        total, empty = _sample_by_sample(outputs, targets, loss)
    value = total.item()
    if not math.isfinite(value):
        raise not_finite(value)
    if value and not total.requires_grad and torch.is_grad_enabled():
        raise ModelError(
            "The loss does not depend on any parameter: it, or the model, detaches the outputs, or "
            "counts instead of measuring (an accuracy)."
        )
    return Nll(total, empty)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    logits = classes_last(logits, targets)
    if targets.is_floating_point():
        return -(targets.movedim(1, -1) * logits.log_softmax(-1)).sum()
    check_labels(targets, logits.shape[-1])
    flat = logits.reshape(-1, logits.shape[-1])
    labels = targets.reshape(-1).long()
    return F.cross_entropy(flat, labels, ignore_index=IGNORED, reduction="sum")


def _value(loss: Any, outputs: Any, targets: Any) -> Tensor:
    value = loss(outputs, targets)
    if not isinstance(value, Tensor) or value.is_complex():
        raise DataError(
            f"The loss gave a {type(value).__name__}: a callable loss takes (outputs, targets) and "
            "returns a real tensor, the negative log-likelihood."
        )
    return value.sum()


def _all_ignored(targets: Any) -> bool:
    whole = isinstance(targets, Tensor) and not targets.is_floating_point()
    return whole and bool((targets.long() == IGNORED).all())


def _sample_by_sample(outputs: Any, targets: Any, loss: Any) -> tuple[Tensor, frozenset[int]]:
    """The sum over samples of a callable, and the samples that have nothing left to score."""
    rows = [slice(n, n + 1) for n in range(len(targets))]
    try:
        values = torch.stack([_value(loss, part(outputs, n), part(targets, n)) for n in rows])
    except GradmaskError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise DataError(
            f"The loss cannot be evaluated on the outputs of one sample ({error}): it takes the "
            "outputs and targets of samples, which are dimension 0 of every tensor in both."
        ) from error
    left = ~values.detach().isnan()
    if not left.any() and _all_ignored(targets):
        return values.new_zeros(()), frozenset(range(len(rows)))
    if len(rows) > 1:
        _check_samples(loss, outputs, targets, values.detach(), left)
        values = values[left] if not left.all() else values
    return values.sum(), frozenset((~left).nonzero().flatten().tolist())


def _check_samples(loss: Any, outputs: Any, targets: Any, values: Tensor, left: Tensor) -> None:
    """The loss of all samples together must be the sum or the mean of those of each alone."""
    try:
        with torch.enable_grad():  # it may differentiate something itself
            whole = _value(loss, outputs, targets).detach().double()
    except Exception:  # a function of one sample only need not take more
        whole = None
    if not left.all() and (whole is None or not whole.isfinite() or not left.any()):
        raise not_finite(math.nan)
    if whole is None:
        return
    found = values[left].double()
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(values.dtype, 5e-2)
    scale = found.abs().sum()
    sums = [(found.sum(), scale), (found.mean(), scale / len(found)), (found[0], found[0].abs())]
    if not any((whole - expected).abs() <= tolerance * size for expected, size in sums):
        raise DataError(
            "The loss of a batch is neither the sum nor the mean of its samples' losses "
            f"({whole.item():.6g}; sum {found.sum().item():.6g}), so a sample has no loss of its "
            "own: it is weighted or averaged over the batch (class weights, a mean over tokens), "
            "compares samples, or uses outputs made over the batch. Use reduction='sum', or give "
            "nn.CrossEntropyLoss(weight=...) itself, which is taken as a weighted sum."
        )


def check_parameters_of(loss: Loss, used: Iterable[nn.Parameter], known: Iterable[Tensor]) -> None:
    """Raise a ModelError if a loss uses parameters that nobody has handed over.

    Args:
        loss: The loss.
        used: Parameters that the loss depends on, and the outputs do not.
        known: Those of the model and of the loss.
    """
    ids = {id(p) for p in known}
    for parameter in used:
        if id(parameter) not in ids:
            raise ModelError(
                f"The loss depends on a trainable parameter ({_name_of(parameter, loss)}) that is "
                "neither the model's nor that of a loss handed over as a module: give the loss as "
                "an nn.Module that holds it, or freeze it with requires_grad_(False)."
            )


def _name_of(parameter: nn.Parameter, loss: Any) -> str:
    """A name by which the user may know a parameter, from what a function holds."""
    inner = [loss, getattr(loss, "__self__", None), *getattr(loss, "args", ())]
    inner += [cell.cell_contents for cell in getattr(loss, "__closure__", None) or ()]
    names = getattr(getattr(loss, "__code__", None), "co_names", ())
    inner += [getattr(loss, "__globals__", {}).get(name) for name in names]
    for holder in inner:
        if isinstance(holder, nn.Module):
            for name, p in holder.named_parameters():
                if p is parameter:
                    return f"{name!r} of a {type(holder).__name__}"
    return f"of shape {tuple(parameter.shape)}"
