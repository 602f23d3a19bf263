"""Which optimizers must be hooked so that no step passes a mask by."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gradmask.errors import OptimizerError

_OWN = {"state", "param_groups", "defaults"}  # of every optimizer, and never another optimizer


def held_parameters(optimizer: Any) -> Iterator[Tensor]:
    """All parameters that an optimizer holds, in groups that were added later too."""
    for group in getattr(optimizer, "param_groups", ()):
        yield from group["params"]


def within(optimizer: Any) -> list[Any]:
    """An optimizer and all that it wraps.

    Args:
        optimizer: The outermost: Accelerate's, Lightning's, SAM, Lookahead, or a plain one.

    Returns:
        The outermost first, then those in its attributes, in lists and dicts there too, and those
        within these; each once.
    """
    found: dict[int, Any] = {}
    waiting = [optimizer]
    while waiting:
        each = waiting.pop(0)
        if id(each) not in found:
            found[id(each)] = each
            waiting += filter(_is_optimizer, _attributes(each))
    return list(found.values())


def _is_optimizer(value: Any) -> bool:
    # A wrapper need not be an Optimizer itself. Schedulers and scalers, which have a step too, have
    # no gradients to zero.
    return isinstance(value, Optimizer) or _shaped(type(value))


def _shaped(value: Any) -> bool:
    return all(callable(getattr(value, method, None)) for method in ("step", "zero_grad"))


def _attributes(optimizer: Any) -> Iterator[Any]:
    seen: set[int] = set()
    waiting = [v for k, v in getattr(optimizer, "__dict__", {}).items() if k not in _OWN]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
        else:
            yield value


def optimizers_to_hook(optimizer: Any, own: Collection[int], scope: str) -> list[Optimizer]:
    """The optimizers that a mask must hook, so that no step passes it by.

    That of a wrapper need not call that of the optimizer inside, nor be called itself (SAM's
    `first_step` and `second_step`): all that can be hooked are. Masking twice does no harm.

    Args:
        optimizer: What the user attaches.
        own: Ids of the model's parameters.
        scope: Scope of the mask.

    Returns:
        All within it that hold parameters of the model and run hooks.

    Raises:
        OptimizerError: If it is no optimizer, has none of the model's parameters, runs no hooks, or
            is one whose weights no mask of this scope can hold.
    """
    shaped = _shaped(optimizer) and not isinstance(optimizer, type)
    if _is_deepspeed(optimizer) or not (shaped or isinstance(optimizer, Optimizer)):
        raise _no_optimizer(optimizer)
    everything = within(optimizer)
    for each in everything:
        for inner in filter(_is_deepspeed, _attributes(each)):
            raise _no_optimizer(inner)
    holders = [o for o in everything if any(id(p) in own for p in held_parameters(o))]
    if not holders:
        raise OptimizerError(
            "The optimizer holds none of the model's parameters: build it from this model's "
            "parameters(), after moving or wrapping the model."
        )
    for each in holders:
        _check_steps(each, scope)
    hooked = [o for o in holders if _runs_hooks(o)]
    if not hooked:
        raise OptimizerError(
            f"The step of {type(optimizer).__name__} runs no hooks (its class does not call "
            "torch.optim.Optimizer.__init__), and none of its attributes is an optimizer that "
            "does: attach the mask to the one it wraps, such as mask.attach(optimizer.optimizer)."
        )
    return hooked


def _no_optimizer(value: Any) -> OptimizerError:
    name = type(value).__name__
    if _is_deepspeed(value):
        return OptimizerError(
            f"{name} is DeepSpeed's, which steps copies of the weights that no hook sees: train "
            "with DistributedDataParallel or fully_shard to mask."
        )
    inside = [k for k, v in getattr(value, "__dict__", {}).items() if isinstance(v, Optimizer)]
    line = f", here mask.attach({name.lower()}.{inside[0]})" if inside else ""
    return OptimizerError(f"attach() got a {name}: give it a torch.optim optimizer{line}.")


def _names(value: Any) -> Iterator[tuple[str, str]]:
    for kind in type(value).__mro__:
        yield kind.__module__.partition(".")[0].lower(), kind.__name__.lower().replace("_", "")


def _is_deepspeed(value: Any) -> bool:
    return any(
        package == "deepspeed" or name.startswith("deepspeed") for package, name in _names(value)
    )


def _runs_hooks(optimizer: Any) -> bool:
    registries = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    runs = getattr(getattr(type(optimizer), "step", None), "hooked", False)
    return bool(runs) and all(isinstance(getattr(optimizer, r, None), dict) for r in registries)


def _check_steps(optimizer: Any, scope: str) -> None:
    name, names = type(optimizer).__name__, list(_names(optimizer))
    if any("lbfgs" in own for _, own in names):
        raise OptimizerError(
            "L-BFGS builds its step from gradients at several points, which no mask fits: "
            "use another optimizer, such as SGD or AdamW."
        )
    if scope != "update":
        return
    # Accelerate's passes train() and eval() on to the one inside, which is looked at by itself.
    swaps = hasattr(optimizer, "train") and hasattr(optimizer, "eval")
    free = any("schedulefree" in package + own for package, own in names)
    if (swaps and (free or len(within(optimizer)) == 1)) or hasattr(optimizer, "swap_swa_sgd"):
        raise OptimizerError(
            f"{name} rewrites the weights outside its step, in train() and eval() or as it swaps "
            "averages in, where scope='update' cannot hold them: use scope='gradient', or an "
            "optimizer that changes weights in its step alone."
        )
    if any("lookahead" in own for _, own in names) and not _runs_hooks(optimizer):
        raise OptimizerError(
            f"{name} pulls the weights back to slow ones in a step that runs no hooks, where "
            "scope='update' cannot hold them: use scope='gradient', or the optimizer inside alone."
        )
