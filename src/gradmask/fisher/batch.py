"""Forward, backward and squares of one batch after the other."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset

from gradmask.distributed import Groups, together
from gradmask.errors import DataError, ModelError
from gradmask.fisher.capture import Capture, Settle, Way, Ways
from gradmask.fisher.likelihood import (
    Loss,
    directional,
    draw_directions,
    exact_terms,
    nll,
    part,
)
from gradmask.fisher.reference import add_per_sample_squares, call

logger = logging.getLogger("gradmask")
DOING = "measuring the Fisher information"


class Pass:
    """A Fisher pass over batches: forward, backward, squares.

    Args:
        model: The model, in eval mode.
        parameters: Its trainable parameters by name.
        kind: Labels of the Fisher information.
        loss: The negative log-likelihood.
        generator: Source of random directions.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        kind: str,
        loss: Loss,
        generator: torch.Generator,
    ) -> None:
        self.model, self.parameters = model, parameters
        self._kind, self._loss, self._generator = kind, loss, generator
        self._safe: Ways | None = None
        self._seen: dict[str, str] = {}

    def add(
        self,
        inputs: Any,
        targets: Tensor,
        totals: dict[str, Tensor],
        groups: Groups = (),
        settle: Settle = lambda _: None,
    ) -> None:
        """Add the squared per-sample gradients of a batch.

        Args:
            inputs: Inputs of N samples.
            targets: Their targets.
            totals: `{name: tensor of the parameter's shape}`, changed in place.
            groups: Ranks that hold the parameters' shards.
            settle: Told the names of totals that the batch adds nothing more to.
        """
        model, parameters, n = self.model, self.parameters, len(targets)
        if n > 1 and self._safe is None:
            self._safe = safe_ways(model, inputs, parameters)
        with Capture(model, parameters, n, self._safe if n > 1 else None) as capture:
            with together(groups, DOING):
                outputs = call(model, inputs)
                capture.resolve(outputs)
                if n > 1 and capture.selects:
                    capture.drop(capture.mixed(outputs))
                loss = self._loss
                if self._kind == "sampled":
                    targets = draw_directions(outputs, targets, loss, self._generator)
                    loss = directional
                if self._kind == "exact":
                    rest_of = exact_terms(outputs, targets, loss)
                    first = next(rest_of)  # checks them all
                else:
                    first, rest_of = nll(outputs, targets, loss), iter(())
            ways = {name: way[0][0] for name, way in capture.ways().items()}
            rest = {k: p for k, p in parameters.items() if k not in capture.handled}
            ways |= dict.fromkeys(rest, "sample")
            if groups:
                _check_rules(ways)
            capture.add_squares(chain([first], rest_of), totals, settle)
            del outputs, first, rest_of
        _report({name: way for name, way in ways.items() if self._seen.get(name) != way})
        self._seen |= ways
        if rest:
            exact_kind = self._kind == "exact"
            add_per_sample_squares(
                model, inputs, targets, rest, totals, exact=exact_kind, loss=loss
            )


def unpacked(batches: Iterable[Any], device: torch.device) -> Iterator[tuple[Any, Tensor]]:
    """Inputs and targets of the batches that hold samples, on the device."""
    for batch in batches:
        inputs, targets = unpack(batch, device)
        if len(targets):
            yield inputs, targets


def safe_ways(model: nn.Module, inputs: Any, parameters: dict[str, nn.Parameter]) -> Ways:
    """How to measure each parameter: the first way that keeps samples apart, as seen on two.

    A dimension that only happens to be as long as the batch is not 2 long here as well, so it is
    not captured; if it is 2, the gradients of one sample's outputs reach the other's row.
    """
    refused: set[tuple[str, Way]] = set()
    while True:
        with Capture(model, parameters, 2, refused=refused) as probe:
            outputs = call(model, part(inputs, slice(2)))
            probe.resolve(outputs)
            ways, mixed = probe.ways(), probe.mixed(outputs)
        if not mixed:
            return ways
        refused |= {(name, ways[name]) for name in mixed}


def _check_rules(ways: dict[str, str]) -> None:
    """Sharded parameters are whole while their layer runs in the common pass, and not after."""
    for name, way in ways.items():
        if way in ("module", "sample"):
            raise ModelError(
                f"Parameter {name!r} is sharded, and no rule measures its layer in one pass: give "
                "fully_shard the block around the layer (attention needs that), register a rule "
                "(gradmask.fisher.register_rule), or freeze it."
            )


def _report(ways: dict[str, str]) -> None:
    """Say which parameters have no rule, and so cost more."""
    for way, text in (
        ("module", "Run again one sample at a time, module by module"),
        ("sample", "Run again one sample at a time, with the whole model"),
    ):
        names = [name for name, found in ways.items() if found == way]
        if names:
            logger.info("%s (no rule applies): %s", text, ", ".join(names))


def check_batches(loader: Any) -> None:
    """Raise a DataError unless this can be read batch by batch."""
    if isinstance(loader, Dataset) or not isinstance(loader, Iterable):
        raise DataError(
            f"Expected batches of (inputs, targets), not a {type(loader).__name__}: a dataset goes "
            "into a torch.utils.data.DataLoader first."
        )


def unpack(batch: Any, device: torch.device) -> tuple[Any, Tensor]:
    """Move a batch to the device and check its form."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise DataError(
            f"The loader gave a {type(batch).__name__}: expected (inputs, targets) batches."
        )
    move = lambda t: t.to(device, non_blocking=True) if isinstance(t, Tensor) else t  # noqa: E731
    inputs, targets = tree_map(move, batch[0]), tree_map(move, batch[1])
    if not isinstance(targets, Tensor) or not targets.dim():
        raise DataError(
            f"The targets of a batch are a {type(targets).__name__}: expected a tensor of shape "
            "(samples, ...)."
        )
    sizes = {len(t) for t in tree_leaves((inputs, targets)) if isinstance(t, Tensor) and t.dim()}
    if len(sizes) != 1:
        raise DataError(
            f"A batch must hold tensors with the same number of samples; found {sorted(sizes)}."
        )
    return inputs, targets
