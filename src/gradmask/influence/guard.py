"""The check of per-sample gradients against those of each sample alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradmask.containers import tensors_in
from gradmask.fisher.calls import Call, LayerCall, full_precision, per_sample_together
from gradmask.fisher.capture import Capture
from gradmask.fisher.reference import gradients_alone
from gradmask.fisher.verify import Excerpts, Schedule, Verify, computed_in, excerpt, warn_of_failed

Parameters = dict[str, nn.Parameter]
# Some samples of a batch; an index may come twice.
Rows = slice | list[int]
# Calls that together explain some parameters, by the names of these.
Groups = dict[frozenset[str], list[Call]]


class Term(Protocol):
    """The scalar whose per-sample gradients are wanted.

    Attributes:
        empty: Samples whose gradient is known to be zero, once the term was asked for all.
        loss: The negative log-likelihood.
    """

    empty: frozenset[int]
    loss: Any

    def __call__(self, outputs: Any, rows: Rows, alone: bool = False) -> Tensor:
        """The sum over some samples, from their outputs."""


class WholeCall(Call):
    """Parameters that no layer explains: the whole model runs again, one sample at a time."""

    def __init__(self, model: nn.Module, inputs: Any, parameters: Parameters, term: Term) -> None:
        super().__init__({}, [])
        self.model, self.given, self.term = model, inputs, term
        self.restrict(parameters)

    def restrict(self, parameters: Parameters) -> None:
        """Measure these parameters only."""
        self.parameters, self.names = parameters, {name: name for name in parameters}

    def per_sample(self, samples: slice) -> dict[str, Tensor]:
        """By single-sample autograd."""
        n = next(t for t in tensors_in(self.given) if t.dim()).shape[0]
        found = {
            name: full_precision(p.new_zeros(len(range(*samples.indices(n))), *p.shape))
            for name, p in self.parameters.items()
        }
        for place, i in enumerate(range(*samples.indices(n))):
            if i in self.term.empty:
                continue

            def value(outputs: Any, copies: int, by_itself: bool, i: int = i) -> list[Tensor]:
                rows = slice(i, i + 1) if by_itself else [i] * copies
                return [self.term(outputs, rows, by_itself)]

            pairs = gradients_alone(self.model, self.given, i, self.parameters, value)
            for name, gradient in next(pairs, {}).items():
                found[name][place] = gradient
        return found


class Refuted(Exception):
    """A check failed, and what was measured is of no use; the guard knows what to do instead."""


class Guard:
    """The check of per-sample gradients against those of each sample alone.

    Args:
        parameters: What is measured.
        alone: Whether all is measured with the whole model, one sample at a time.
        verify: How it is checked.
    """

    def __init__(self, parameters: Parameters, alone: bool, verify: Verify) -> None:
        self.parameters = parameters
        self.fast: Parameters = {} if alone else parameters
        self._schedule = Schedule(verify, parameters)
        self._precision = computed_in(parameters.values())

    def check(self, capture: Capture, groups: Groups, whole: WholeCall, count: int) -> None:
        """Compare the gradients of a batch, if it is its turn.

        Args:
            capture: The batch.
            groups: Its gradients.
            whole: The same by single-sample autograd.
            count: Samples in the batch.

        Raises:
            Refuted: If they differ.
        """
        check = self._schedule.check(capture.structure, capture.sizes(), count)
        names = {name: p for name, p in self.fast.items() if name in capture.handled}
        if check is None or not names:
            return
        whole.restrict(names)
        with torch.no_grad():
            expected = _excerpts(whole.per_sample(check.rows), check.turn)
            forms: list[Excerpts] = [{name: torch.zeros_like(s) for name, s in expected.items()}]
            for group in groups.values():
                for k, gradients in enumerate(_all_forms(group, check.rows, self.parameters)):
                    if k == len(forms):
                        forms.append({})
                    excerpts = _excerpts(gradients, check.turn)
                    forms[k] |= {name: e for name, e in excerpts.items() if name in names}
        for form in forms:
            if bad := self._schedule.wrong(forms[0] | form, expected, self._precision, power=1):
                warn_of_failed(bad)
                raise Refuted


def _excerpts(gradients: dict[str, Tensor], turn: int) -> Excerpts:
    """Excerpts of weighted sums over the samples, so that their signs count."""
    found: Excerpts = {}
    for name, g in gradients.items():
        weights = torch.arange(1, len(g) + 1, device=g.device).to(g.dtype)
        found[name] = excerpt(torch.tensordot(weights, g, 1), turn)
        if g.is_complex():
            found[name] = torch.view_as_real(found[name]).reshape(-1)
    return found


def _all_forms(
    group: list[Call], rows: slice, parameters: Parameters
) -> Iterator[dict[str, Tensor]]:
    """Per-sample gradients in every form in which they are used."""
    gradients = per_sample_together(group, rows)
    yield gradients
    call = group[0]
    product = call.as_product(rows) if len(group) == 1 and isinstance(call, LayerCall) else None
    if product is not None:
        found = {}
        if "weight" in call.names:
            name = call.names["weight"]
            formed = product.deltas @ product.unfold(product.inputs).mT
            found[name] = formed.reshape(-1, *parameters[name].shape)
        if "bias" in call.names:
            found[call.names["bias"]] = product.deltas.sum(-1)
        yield found
    if len(group) == 1 and isinstance(call, LayerCall):
        ones = {n: torch.ones_like(g[0]) for n, g in gradients.items()}
        values = call.weigh_squares(ones, rows)
        if values is not None:  # the gradients again, as long as it says they are
            squares = [g.flatten(1).square().sum(1).double() for g in gradients.values()]
            sums = torch.stack(squares).sum(0)
            scale = torch.where(sums > 0, values / sums, 1.0)
            shaped = {n: scale.to(g).view(-1, *[1] * (g.dim() - 1)) for n, g in gradients.items()}
            yield {n: g * shaped[n] for n, g in gradients.items()}
