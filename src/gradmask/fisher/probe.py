"""How each parameter can be measured without mixing samples, found out on two of them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from gradmask.containers import part
from gradmask.fisher.capture import Capture, Way, Ways
from gradmask.fisher.scored import Scored, call


def safe_ways(
    model: nn.Module,
    inputs: Any,
    parameters: dict[str, nn.Parameter],
    *,
    trust_rules: bool = False,
) -> Ways:
    """How to measure each parameter: the first way that keeps samples apart, as seen on two.

    A dimension that only happens to be as long as the batch is not 2 long here as well, so it is
    not captured; if it is 2, the gradients of one sample's outputs reach the other's row.

    Args:
        model: The model, in eval mode.
        inputs: Inputs of at least two samples.
        parameters: What is measured.
        trust_rules: Leave it to a later check if all are layers with a rule.
    """
    refused: set[tuple[str, Way]] = set()
    while True:
        with Capture(model, parameters, 2, refused=refused) as probe:
            outputs = call(model, part(inputs, slice(2)))
            probe.resolve(outputs)
            ways = probe.ways()
            simple = trust_rules and all(kind[0] == "rule" for way in ways.values() for kind in way)
            mixed = set() if simple else probe.mixed(outputs)
        if not mixed:
            return ways
        refused |= {(name, ways[name]) for name in mixed}


class Remembered:
    """What was found out on two samples of a model, for batches like those it was right for.

    Args:
        names: What is measured.
        ways: How.
    """

    def __init__(self, names: frozenset[str], ways: Ways) -> None:
        self.names, self.ways = names, ways
        self.batches: set[Hashable] = set()


_MODELS: WeakKeyDictionary[nn.Module, Remembered] = WeakKeyDictionary()
_MOST = 64  # kinds of batches of a model


def remembered(model: nn.Module, names: frozenset[str]) -> Remembered | None:
    """What is known of a model, if it is of the same parameters.

    Args:
        model: The model.
        names: What is measured.
    """
    found = _MODELS.get(_inner(model))
    return found if found is not None and found.names == names else None


def remember(model: nn.Module, names: frozenset[str], ways: Ways, batch: Hashable) -> None:
    """Note that a batch was measured rightly.

    Args:
        model: The model.
        names: What was measured.
        ways: How.
        batch: Tells batches of other operations, sizes or numbers of samples apart.
    """
    known = remembered(model, names)
    if known is None or known.ways != ways:
        known = _MODELS[_inner(model)] = Remembered(names, ways)
    if len(known.batches) < _MOST:
        known.batches.add(batch)


def forget(model: nn.Module) -> None:
    """Know nothing of a model."""
    _MODELS.pop(_inner(model), None)


def _inner(model: nn.Module) -> nn.Module:
    return model.model if isinstance(model, Scored) else model
