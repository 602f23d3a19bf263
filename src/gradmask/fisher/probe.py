"""How each parameter can be measured without mixing samples, found out on two of them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gradmask.containers import part
from gradmask.distributed import is_sharded, reshard
from gradmask.errors import ModelError, first_names
from gradmask.fisher.calls import differentiable, unequal_sums
from gradmask.fisher.capture import Capture, Strategies, Strategy
from gradmask.fisher.reference import gradients_alone, zero_squares
from gradmask.fisher.rules import squared
from gradmask.fisher.scored import Called, Wrapped, call
from gradmask.fisher.verify import Check, Schedule, computed_in, excerpt
from gradmask.measuring import measuring, random_state_kept


def safe_strategies(
    model: nn.Module,
    inputs: Any,
    parameters: dict[str, nn.Parameter],
    *,
    trust_rules: bool = False,
    refuses: Callable[[Strategy], bool] = lambda _: False,
) -> Strategies:
    """How to measure each parameter: the first strategy that keeps samples apart, as seen on two.

    A dimension that only happens to be as long as the batch is not 2 long here as well, so it is
    not captured; if it is 2, the gradients of one sample's outputs reach the other's row.

    Args:
        model: The model, in eval mode.
        inputs: Inputs of at least two samples.
        parameters: What is measured.
        trust_rules: Leave it to a later check if all are layers with a rule.
        refuses: Tells strategies that are not to be taken.
    """
    refused: set[tuple[str, Strategy]] = set()
    while True:
        with Capture(model, parameters, 2, refused=refused) as probe:
            outputs = call(model, part(inputs, slice(2)))
            probe.resolve(outputs)
            strategies = probe.strategies()
            simple = trust_rules and all(
                kind[0] == "rule" for strategy in strategies.values() for kind in strategy
            )
            mixed = {name for name, strategy in strategies.items() if refuses(strategy)}
            if not mixed and not simple:
                mixed = probe.mixed(outputs)
        if not mixed:
            return strategies
        refused |= {(name, strategies[name]) for name in mixed}


def training_strategies(
    model: nn.Module, given: tuple[Any, Any], parameters: dict[str, nn.Parameter]
) -> Strategies:
    """How each parameter can be measured while the model trains; some may have no strategy.

    The samples are told apart in train mode, and in eval mode (where a forward pass is not random)
    what is measured is compared with the gradients of single samples.

    Args:
        model: The model, in train mode; it is as before afterwards.
        given: Positional and keyword arguments of its call, of two samples.
        parameters: What is measured.

    Returns:
        The strategies, without those that take a pass of their own.

    Raises:
        ModelError: If a rule is wrong.
    """
    inner, sharded = Called(model), any(map(is_sharded, parameters.values()))
    with (
        measuring(model, parameters.values(), mode=random_state_kept),
        _changing(model) as changing,
    ):

        def refuses(strategy: Strategy) -> bool:
            return any(
                k[0] == "derived" or (k[0] == "module" and (sharded or k[1] in changing))
                for k in strategy
            )

        strategies = safe_strategies(inner, given, parameters, refuses=refuses)
    if sharded:  # whole in the common pass only
        reshard(model)
        return strategies
    with measuring(model, parameters.values()):
        in_eval = safe_strategies(inner, given, parameters, refuses=refuses)
        _check_strategies(inner, given, parameters, in_eval)
    return strategies


@contextmanager
def _changing(model: nn.Module) -> Iterator[set[int]]:
    """Ids of modules that draw at random or change their buffers: again they are not the same."""
    devices = sorted({p.device for p in model.parameters() if p.is_cuda}, key=str)
    found: set[int] = set()
    before: dict[nn.Module, list[Any]] = defaultdict(list)

    def state(module: nn.Module) -> tuple[list[Tensor], Any]:
        drawn = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
        buffers = [(id(buffer), buffer._version) for buffer in module.buffers()]
        return drawn, (buffers, random.getstate())

    def compare(module: nn.Module, *_: Any) -> None:
        (drawn, rest), (drawn_now, rest_now) = before[module].pop(), state(module)
        if rest != rest_now or not all(map(torch.equal, drawn, drawn_now)):
            found.add(id(module))

    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    handles: list[Any] = [m.register_forward_hook(compare) for m in modules]
    handles += [
        m.register_forward_pre_hook(lambda m, _: before[m].append(state(m))) for m in modules
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _check_strategies(
    model: nn.Module, given: Any, parameters: dict[str, nn.Parameter], strategies: Strategies
) -> None:
    """Raise a ModelError if squares are not those of single samples, for a made-up loss."""

    def terms(outputs: Any, *_: Any) -> list[Tensor]:
        sums = [unequal_sums(t).sum() for t in differentiable(outputs) if t.dim()]
        if not sums:
            raise ModelError(
                "The model returns no outputs of samples (a loss alone, perhaps): they cannot be "
                "told apart: return the logits too, or collect of the submodule that does."
            )
        return [torch.stack(sums).sum()]

    schedule = Schedule("all", parameters)
    check = Check(slice(None), 0)
    totals = {name: zero_squares(p) for name, p in parameters.items()}
    with Capture(model, parameters, 2, strategies) as capture:
        outputs = call(model, given)
        capture.resolve(outputs)
        found = capture.add_squares(terms(outputs), totals, check=check)
        handled = {name: p for name, p in parameters.items() if name in capture.handled}
    if not handled:
        return
    alone = {name: torch.zeros_like(value) for name, value in found.items()}
    for n in range(2):
        for gradients in gradients_alone(model, given, n, handled, terms):
            for name, g in gradients.items():
                alone[name] += squared(excerpt(g, check.turn))
    if wrong := schedule.wrong(found, alone, computed_in(parameters.values())):
        raise ModelError(
            f"What is measured of {first_names(wrong)} is not what single samples give: a rule of "
            "a layer may be wrong (gradmask.fisher.register_rule)."
        )


class Remembered:
    """What was found out on two samples of a model, for batches like those it was right for.

    Args:
        names: What is measured.
        strategies: How.
    """

    def __init__(self, names: frozenset[str], strategies: Strategies) -> None:
        self.names, self.strategies = names, strategies
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


def remember(
    model: nn.Module, names: frozenset[str], strategies: Strategies, batch: Hashable
) -> None:
    """Note that a batch was measured rightly.

    Args:
        model: The model.
        names: What was measured.
        strategies: How.
        batch: Tells batches of other operations, sizes or numbers of samples apart.
    """
    known = remembered(model, names)
    if known is None or known.strategies != strategies:
        known = _MODELS[_inner(model)] = Remembered(names, strategies)
    if len(known.batches) < _MOST:
        known.batches.add(batch)


def forget(model: nn.Module) -> None:
    """Know nothing of a model."""
    _MODELS.pop(_inner(model), None)


def _inner(model: nn.Module) -> nn.Module:
    return model.model if isinstance(model, Wrapped) else model
