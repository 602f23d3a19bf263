"""Forward, backward and squares of one batch after the other."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradmask.containers import part
from gradmask.distributed import Groups, all_ranks_raise, sum_over
from gradmask.errors import DataError, ModelError, first_names
from gradmask.fisher.calls import Unmeasurable
from gradmask.fisher.capture import Capture, OnComplete, Strategies
from gradmask.fisher.likelihood import Loss, directional, draw_directions, exact_terms
from gradmask.fisher.losses import check_parameters_of, likelihood_of, nll
from gradmask.fisher.probe import forget, remember, remembered, safe_strategies
from gradmask.fisher.reference import (
    add_per_sample_squares,
    check_independent,
    check_repeatable,
    sample_gradients,
    zero_means,
)
from gradmask.fisher.rules import squared
from gradmask.fisher.scored import call
from gradmask.fisher.verify import (
    Check,
    Excerpts,
    Schedule,
    Verify,
    computed_in,
    excerpt,
    warn_of_failed,
)

logger = logging.getLogger("gradmask")
ACTIVITY = "measuring the Fisher information"


class _Terms(NamedTuple):
    """What is differentiated in a batch.

    Attributes:
        first: A scalar, the sum over the samples of that sample's own value.
        rest: More of them.
        targets: The targets, or what was drawn in their place.
        options: Those of `sample_gradients`.
    """

    first: Tensor
    rest: Iterator[Tensor]
    targets: Tensor
    options: dict[str, Any]


class Pass:
    """A Fisher pass over batches: forward, backward, squares, and the check of some samples.

    Args:
        model: The model, in eval mode.
        parameters: Its trainable parameters by name, and those of the loss.
        kind: Labels of the Fisher information.
        loss: The negative log-likelihood.
        generator: Source of random directions.
        verify: How it is checked.
        mean: Whether to add up the gradients themselves as well.

    Attributes:
        means: Sums over the samples of their gradients, by name; None if not wanted.
        alone: Whether all is measured with the whole model, one sample at a time, since a check
            failed.
        reached: Names on which some sample's loss depends.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        kind: str,
        loss: Loss,
        generator: torch.Generator,
        verify: Verify = "spread",
        *,
        mean: bool = False,
    ) -> None:
        self.model, self.parameters = model, parameters
        self._mean = mean
        self.alone = False
        self.reached: set[str] = set()
        self._kind, self._loss = kind, loss
        self._generator, self._start = generator, generator.get_state()
        self._verify, self._trusts = verify, bool(verify)  # rules, until a check fails
        self._precision = computed_in(parameters.values())
        self.restart()

    def restart(self) -> None:
        """Begin again, from the first batch."""
        self._generator.set_state(self._start)
        zeros = {name: zero_means(p) for name, p in self.parameters.items()} if self._mean else None
        self.means: dict[str, Tensor] | None = zeros
        self._schedule = Schedule(self._verify, self.parameters, self._generator.initial_seed())
        self._strategies: Strategies | None = None
        self._independent = False  # seen to be
        self._layouts: set[str] = set()
        self._seen: dict[str, str] = {}
        self._slow: set[str] = set()

    def add(
        self,
        inputs: Any,
        targets: Tensor,
        totals: dict[str, Tensor],
        groups: Groups = (),
        on_complete: OnComplete = lambda _: None,
    ) -> bool:
        """Add the squared per-sample gradients of a batch.

        Args:
            inputs: Inputs of N samples.
            targets: Their targets.
            totals: `{name: tensor of the parameter's shape}`, changed in place.
            groups: Ranks that hold the parameters' shards.
            on_complete: Told the names of totals that the batch adds nothing more to.

        Returns:
            False if the check failed: the totals are of no use; from now on all is measured in a
            safer strategy.
        """
        n, trusts = len(targets), self._trusts and not groups
        fast = {} if self.alone else self.parameters
        first, names = n > 1 and self._strategies is None, frozenset(fast)
        before = remembered(self.model, names) if first and trusts else None
        if before is not None:
            self._strategies = before.strategies
        elif first:
            self._strategies = safe_strategies(self.model, inputs, fast, trust_rules=trusts)
        strategies = self._strategies if n > 1 else None
        with Capture(self.model, fast, n, strategies) as capture:
            with all_ranks_raise(groups, ACTIVITY):
                outputs = call(self.model, inputs)
                batch = self._terms(outputs, targets)
                capture.resolve(outputs, batch.first)
                known = chain(self.model.parameters(), self.parameters.values())
                check_parameters_of(self._loss, capture.of_loss, known)
                unexplained = (
                    strategies or {}
                ).keys() & capture.reached - capture.strategies().keys()
                form = capture.structure, capture.sizes(), n
            if before is not None and (unexplained or form not in before.batches):
                forget(self.model)
                self._strategies = None
            again = first and (self._strategies is None or (trusts and bool(unexplained)))
            check = None if again else self._schedule.check(*form, passed=before is not None)
            if not again and n > 1 and self._may_mix(capture, check, groups):
                with all_ranks_raise(groups, ACTIVITY):
                    capture.drop(capture.mixed(outputs))
            if not again:
                handled = {k: p for k, p in fast.items() if k in capture.handled}
                with all_ranks_raise(groups, ACTIVITY):
                    self._note(capture, n, groups)
                check = None if groups else check
                try:
                    terms = chain([batch.first], batch.rest)
                    found = capture.add_squares(terms, totals, on_complete, check, self.means)
                except Unmeasurable:
                    forget(self.model)
                    self._trusts = False
                    self._distrust(set(fast))
                    return False
                del terms
            scored, options = batch.targets, batch.options
            del outputs, batch  # and with them the graph
        if again:
            if (
                self._strategies is not None
            ):  # a dimension was 2 long by chance: the probe finds out
                self._trusts, self._strategies = False, None
            return self.add(inputs, targets, totals, groups, on_complete)
        data = self.model, inputs, scored
        rest = {k: p for k, p in self.parameters.items() if k not in handled}
        cut = rest or "module" in self._seen.values()
        if cut and n > 1 and (check is not None or not self._independent):
            self._check_independent(inputs, n)
        if rest:
            self.reached |= add_per_sample_squares(*data, rest, totals, self.means, **options)
        if check is not None and check.turn == 1 and before is None:
            check_repeatable(self.model, inputs, range(n)[check.rows][0], self._precision)
        if check is None or not handled:
            return True
        alone: Excerpts = {name: torch.zeros_like(value) for name, value in found.items()}
        for gradients in sample_gradients(*data, handled, rows=check.rows, **options):
            for name, g in gradients.items():
                alone[name] += squared(excerpt(g, check.turn))
        wrong = self._schedule.wrong(found, alone, self._precision)
        if wrong and not self._saturated(inputs, scored, options["loss"], check.rows):
            self._check_independent(inputs, n)
            forget(self.model)
            self._distrust(wrong)
            return False
        if first and self._strategies:
            remember(self.model, names, self._strategies, form)
        return True

    def _check_independent(self, inputs: Any, samples: int) -> None:
        """Refuse samples that depend on others, the first (in time, perhaps) least likely."""
        self._independent = True
        rows = sorted({samples - 1, samples // 2, 0}, reverse=True)
        check_independent(self.model, inputs, rows, self._precision)

    def _saturated(self, inputs: Any, targets: Tensor, loss: Loss, rows: slice) -> bool:
        """Whether the checked samples are so sure of their labels that rounding decides."""
        if self._loss not in ("cross_entropy", "bernoulli"):
            return False  # the scale of its gradients is not known
        with torch.no_grad():
            outputs = call(self.model, part(inputs, rows))
        with torch.enable_grad():
            outputs = outputs.detach().requires_grad_()
            total = nll(outputs, part(targets, rows), loss).total
            (slopes,) = torch.autograd.grad(total, outputs)
        return bool(slopes.abs().max() < 3200 * torch.finfo(self._precision).eps)

    def _terms(self, outputs: Any, targets: Tensor) -> _Terms:
        """Scalars whose squared per-sample gradients add up to what is measured."""
        self._check_layout(outputs, targets)
        if self._kind == "exact":
            rest = exact_terms(outputs, targets, self._loss)
            return _Terms(next(rest), rest, targets, {"exact": True, "loss": self._loss})
        loss = self._loss
        if self._kind == "sampled":
            targets = draw_directions(outputs, targets, loss, self._generator)
            loss = directional
        total, empty = nll(outputs, targets, loss)
        return _Terms(total, iter(()), targets, {"loss": loss, "skip": empty})

    def _check_layout(self, outputs: Any, targets: Tensor) -> None:
        """Refuse logits (N, T, C) whose T is C in one batch: there they look like (N, C, T)."""
        of_classes = likelihood_of(self._loss) == "cross_entropy"
        if not of_classes or not isinstance(outputs, Tensor) or outputs.dim() < 3:
            return
        first = targets.shape == (outputs.shape[0], *outputs.shape[2:])
        last = targets.shape == outputs.shape[:-1]
        self._layouts.add("either" if first and last else "first" if first else "last")
        if {"either", "last"} <= self._layouts:
            raise DataError(
                f"Logits of shape {tuple(outputs.shape)} have as many positions as classes in one "
                "batch and the classes last in others, so which is which cannot be told: give "
                "logits as (samples, classes, positions)."
            )

    def _may_mix(self, capture: Capture, check: Check | None, groups: Groups) -> bool:
        """Whether to look for samples that are mixed; all ranks must run the same passes."""
        may = capture.rearranges or (bool(groups) and check is not None)
        flag = torch.tensor([may], dtype=torch.int32, device="cpu")
        return bool(sum_over(flag, groups)) if groups else may

    def _note(self, capture: Capture, samples: int, groups: Groups) -> None:
        """Note what is measured how."""
        self.reached |= capture.reached
        strategies = {name: strategy[0][0] for name, strategy in capture.strategies().items()}
        strategies |= dict.fromkeys(self.parameters.keys() - capture.handled, "sample")
        if groups:
            _check_rules(strategies)
        news = {
            name: strategy
            for name, strategy in strategies.items()
            if self._seen.get(name) != strategy
        }
        _report(news)
        if samples > 1 and not self.alone:
            slow = {
                name for name, strategy in strategies.items() if strategy == "sample"
            } - self._slow
            _warn_of_slow(slow)
            self._slow |= slow
        self._seen |= strategies

    def _distrust(self, wrong: set[str]) -> None:
        """Measure one sample at a time from now on: if one name is wrong, others may be."""
        if self._trusts:  # the probe of two samples has not been asked yet
            self._trusts = False
            return
        warn_of_failed(wrong)
        self.alone = True


def _check_rules(strategies: dict[str, str]) -> None:
    """Sharded parameters are whole while their layer runs in the common pass, and not after."""
    for name, strategy in strategies.items():
        if strategy in ("derived", "module", "sample"):
            raise ModelError(
                f"Parameter {name!r} is sharded, and no rule measures its layer in one pass: give "
                "fully_shard the block around the layer (attention needs that), register a rule "
                "(gradmask.fisher.register_rule), or freeze it."
            )


def _report(strategies: dict[str, str]) -> None:
    """Say which parameters have no rule, and so cost more."""
    names = [name for name, found in strategies.items() if found == "module"]
    if names:
        logger.info(
            "Run again one sample at a time, module by module (no rule applies): %s",
            ", ".join(names),
        )


def _warn_of_slow(names: set[str]) -> None:
    """Name the parameters for which the whole model runs again for each sample, and the mend."""
    if names:
        logger.warning(
            "The whole model runs again for each sample, which is slow, since no rule measures %s: "
            "put what uses it into a module of its own, register a rule for that "
            "(gradmask.fisher.register_rule), or freeze it.",
            first_names(names),
        )
