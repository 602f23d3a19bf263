"""Each source's step on each probe sample: perturbed forward passes and their derivatives."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradmask.containers import part, tensors_in
from gradmask.errors import ModelError
from gradmask.fisher.scored import call
from gradmask.fisher.verify import computed_in
from gradmask.influence.problem import Blocks, LossTerm, Problem, check_outputs
from gradmask.influence.samples import captured, stacked

logger = logging.getLogger("gradmask")

# Where perturbed forward passes run for one source at a time: convolutions with many weights at
# once are slower there than one after the other.
ONE_BY_ONE = ("cpu",)

Gradient = dict[str, Tensor]
Value = Callable[[Gradient, slice], Tensor]  # of one source's gradient and some probe samples


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention by ordinary operations: the fused ones have no forward derivative."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def divergences(problem: Problem, step: float) -> Blocks:
    """KL( f(x; θ) ‖ f(x; θ − ε g_i) ) of every source i and probe sample x (equation 3)."""
    head = problem.head
    assert head is not None
    batched = problem.device.type not in ONE_BY_ONE
    check_reached(problem)
    passes = _probe_outputs(problem, batched)
    before = {columns.start: head.logits(outputs) for columns, outputs in passes}

    def move(gradients: Gradient) -> None:
        for name, gradient in gradients.items():
            gradients[name] = torch.sub(problem.parameters[name], gradient, alpha=step)

    def value(moved: Gradient, columns: slice) -> Tensor:
        outputs = head.logits(_run(problem, moved, part(problem.probe.inputs, columns)))
        return head.divergence(before[columns.start][: len(outputs)], outputs)

    return _pairs(problem, value, batched, move)


def variances(problem: Problem) -> Blocks:
    """g_iᵀ F(x) g_i = Var_{c∼f(x)} (J(x) g_i)_c of every source and probe sample (equation 4)."""
    for _ in _probe_outputs(problem, batched=True):  # to fail before long work
        pass
    return _pairs(problem, _variance_along(problem), batched=True)  # the forward pass is shared


def can_differentiate(problem: Problem) -> bool:
    """Whether forward derivatives can be had and are those of backward passes; by one sample.

    What runs without gradients, and hooks on gradients, count in backward passes only.
    """
    head = problem.head
    assert head is not None
    directions = {n: _direction(p) for n, p in problem.parameters.items()}
    sample = part(problem.probe.inputs, slice(1))
    works = _works(lambda: _variance_along(problem)(directions, slice(1)))
    if works:
        here = {n: p.detach() for n, p in problem.parameters.items()}
        run = lambda moved: head.logits(_run(problem, moved, sample))  # noqa: E731
        with torch.no_grad(), plain_attention():
            changes = jvp(run, (here,), (directions,))[1]
        weights = torch.arange(1, changes.numel() + 1, device=changes.device).cos()
        along = (changes.flatten() * weights).sum().item()
        outputs = head.logits(call(problem.model, sample)).flatten()
        total = (outputs * weights).sum()
        found = torch.autograd.grad(total, list(problem.parameters.values()), allow_unused=True)
        pairs = [(g, d) for g, d in zip(found, directions.values(), strict=True) if g is not None]
        terms = [(g.conj() * d).real.double() for g, d in pairs]
        size = sum(t.abs().sum().item() for t in terms)
        near = 1e-8 if computed_in(problem.parameters.values()) == torch.float64 else 1e-3
        works = not abs(along - sum(t.sum().item() for t in terms)) > near * size  # NaN: told later
    if not works:
        logger.info("Forward derivatives do not serve: gradients of all labels instead.")
    return works


def _direction(parameter: Tensor) -> Tensor:
    """Entries of either sign, all different."""
    numbers = torch.arange(1, parameter.numel() + 1, device=parameter.device).sin()
    return numbers.reshape(parameter.shape).to(parameter.dtype)


def check_reached(problem: Problem) -> None:
    """Refuse a model that uses parameters by other references than its modules' own.

    Raises:
        ModelError: If putting others in their places does not move the outputs, and changing their
            values does.
    """
    sample = part(problem.probe.inputs, slice(1))
    for name, parameter in problem.parameters.items():
        kept = parameter.detach().clone()
        moved = kept + _direction(kept) * (kept.abs().mean() + 1)
        with torch.no_grad():
            swapped = tensors_in(_run(problem, {name: moved}, sample))
            try:
                parameter.data.copy_(moved)
                changed = tensors_in(call(problem.model, sample))
            finally:
                parameter.data.copy_(kept)
        for a, b in zip(swapped, changed, strict=True):
            if a.shape == b.shape and not torch.allclose(a, b, rtol=1e-3, equal_nan=True):
                raise ModelError(
                    f"The model uses its parameter {name!r} by a reference of its own (in a list, "
                    "a function), so a step cannot be tried on it: use the module's attribute, or "
                    "nn.ParameterList."
                )


def _variance_along(problem: Problem) -> Value:
    head = problem.head
    assert head is not None

    def value(gradient: Gradient, columns: slice) -> Tensor:
        inputs = part(problem.probe.inputs, columns)
        here = {n: problem.parameters[n].detach() for n in gradient}
        run = lambda moved: head.logits(_run(problem, moved, inputs))  # noqa: E731
        logits, changes = jvp(run, (here,), (gradient,))[:2]
        return head.variance(logits, changes)

    return value


def _probe_outputs(problem: Problem, batched: bool) -> Iterator[tuple[slice, Any]]:
    with torch.no_grad(), plain_attention():
        for columns in problem.probe.blocks(problem.pair_blocks(batched)[1]):
            outputs = call(problem.model, part(problem.probe.inputs, columns))
            yield columns, check_outputs(outputs)


def _pairs(
    problem: Problem,
    value: Value,
    batched: bool,
    change: Callable[[Gradient], None] = lambda gradients: None,
) -> Blocks:
    """Values of all pairs; if wanted, many sources at once where the model allows it.

    Args:
        problem: What is measured.
        value: Of one source's gradient and some probe samples.
        batched: Whether many sources are wanted at once.
        change: Puts something else in the place of the gradients first.
    """
    sources, samples = problem.pair_blocks(batched)
    batched = batched and sources > 1 and _can_batch(problem, value)
    data = problem.sources
    for rows in data.blocks(sources):
        n = rows.stop - rows.start
        with captured(problem.model, data, rows) as taken:
            groups = taken.gradients(LossTerm(data, rows))
            with torch.no_grad():
                gradients = stacked(groups, problem.parameters)
                change(gradients)
            del groups
        with torch.no_grad(), plain_attention():
            for columns in problem.probe.blocks(samples):
                if batched:
                    found = vmap(value, in_dims=(0, None))(gradients, columns)
                else:
                    each = [{k: g[i] for k, g in gradients.items()} for i in range(n)]
                    found = torch.stack([value(gradient, columns) for gradient in each])
                yield rows, columns, found


def _can_batch(problem: Problem, value: Value) -> bool:
    two = {n: torch.zeros_like(p).expand(2, *p.shape) for n, p in problem.parameters.items()}
    works = _works(lambda: vmap(value, in_dims=(0, None))(two, slice(0, 1)))
    if not works:
        logger.info("torch.func.vmap cannot run this model: one source at a time.")
    return works


def _works(attempt: Callable[[], Tensor]) -> bool:
    """Whether an attempt succeeds; what fails for other reasons fails in the other way too."""
    try:
        with torch.no_grad(), plain_attention(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of PyTorch's own first `jvp`
            attempt()
    except (RuntimeError, TypeError, ValueError):
        return False
    return True


def _run(problem: Problem, parameters: Gradient, inputs: Any) -> Tensor:
    own = problem.parameters
    with replaced(problem.model, {id(own[name]): t for name, t in parameters.items()}):
        outputs: Tensor = call(problem.model, inputs)
    return outputs


@contextmanager
def replaced(model: nn.Module, tensors: dict[int, Tensor]) -> Iterator[None]:
    """Put tensors in the place of parameters, wherever a module of the model holds these.

    `torch.func.functional_call` puts modules that are registered twice back in the wrong order.

    Args:
        model: The model.
        tensors: `{id of a parameter: what takes its place}`.
    """
    places = [
        (module._parameters, key, p)
        for module in model.modules()
        for key, p in module._parameters.items()
        if id(p) in tensors
    ]
    try:
        for held, key, parameter in places:
            held[key] = tensors[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for held, key, parameter in places:
            held[key] = parameter
