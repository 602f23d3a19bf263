"""How inputs become a call of the model, and its outputs logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradmask.containers import entry
from gradmask.fisher.tasks import Task


class Padded(NamedTuple):
    """Inputs of which not every position counts.

    Attributes:
        inputs: The inputs.
        counts: Whether a position does, of the shape of the logits without their classes.
    """

    inputs: Any
    counts: Tensor


def call(model: nn.Module, inputs: Any) -> Any:
    """Call the model: a tuple or list gives positional arguments, a mapping gives keywords.

    A model whose forward takes one tuple or mapping gets it as it is.
    """
    if isinstance(model, Wrapped):
        return model(inputs)
    if isinstance(inputs, tuple | list):
        return model(inputs) if takes_one(model, inputs, {}) else model(*inputs)
    if has_names(inputs):
        keywords = {str(key): inputs[key] for key in inputs}
        return model(inputs) if takes_one(model, (), keywords) else model(**keywords)
    return model(inputs)


class Wrapped(nn.Module):
    """A model that is called in another way.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's own names."""
        return self.model.named_parameters(*args, **options)


class Called(Wrapped):
    """A model that takes a pair of its positional and its named arguments."""

    def forward(self, given: tuple[Any, Any]) -> Any:
        """What the model returns."""
        args, kwargs = given
        return self.model(*args, **kwargs)


class Scored(Wrapped):
    """A model whose outputs are the logits alone, where it returns them by that name.

    Logits of positions that do not count are constant, so that nothing depends on them.

    Args:
        model: The model.
        of_classes: Whether the logits are those of classes.
    """

    def __init__(self, model: nn.Module, of_classes: bool) -> None:
        super().__init__(model)
        self.of_classes = of_classes
        self.task: Task | None = None

    def forward(self, inputs: Any) -> Any:
        """The logits, with the classes where PyTorch's losses have them."""
        given, counts = inputs if isinstance(inputs, Padded) else (inputs, None)
        outputs = call(self.model, given)
        logits = entry(outputs, "logits")
        if not isinstance(logits, Tensor):
            return outputs
        if self.task is None:  # three dimensions: a language model's, with the classes last
            return logits.movedim(-1, 1) if self.of_classes and logits.dim() == 3 else logits
        logits = self.task.arranged(logits)
        if counts is None or counts.shape != logits.shape[:1] + logits.shape[2:]:
            return logits
        return torch.where(counts.unsqueeze(1), logits, 0.0)


def has_names(batch: Any) -> bool:
    """Whether a batch is a mapping, or looks like one."""
    return hasattr(batch, "keys") and hasattr(batch, "__getitem__")


def takes_one(model: nn.Module, args: Any, keywords: dict[str, Any]) -> bool:
    """Whether these do not fit the parameters of `forward`, and one argument does."""
    signature = _signature(model)
    if signature is None:
        return False
    return not _binds(signature, *args, **keywords) and _binds(signature, None)


def accepts(model: nn.Module, keywords: dict[str, Any]) -> bool:
    """Whether `forward` takes these."""
    signature = _signature(model)
    return signature is None or _binds(signature, **keywords)


def _signature(model: nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None


def _binds(signature: inspect.Signature, *args: Any, **keywords: Any) -> bool:
    try:
        signature.bind(*args, **keywords)
    except TypeError:
        return False
    return True
