"""Quadratic forms of the sources' gradients with the Fisher information of the probe samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from gradmask.containers import part
from gradmask.fisher.diagonal import fisher_diagonal
from gradmask.fisher.likelihood import exact_terms
from gradmask.fisher.verify import Verify
from gradmask.influence.guard import Rows
from gradmask.influence.problem import Blocks, LossTerm, Problem
from gradmask.influence.products import gram_matrix, weighted_squares
from gradmask.influence.samples import Block, captured
from gradmask.influence.steps import can_differentiate, variances


def quadratic_forms(problem: Problem) -> Blocks:
    """g_iᵀ F(x) g_i of every source i and probe sample x (equation 4), in the cheapest way.

    Either from the model's derivative along each source's gradient, or from the gradients of each
    probe sample at each label. The second needs no forward derivative, so it always works.

    Args:
        problem: What is measured; the probe's targets say that only these labels count.

    Yields:
        Blocks of values.
    """
    along = problem.probe.targets is None and derivatives_pay(problem)
    return variances(problem) if along else _gram_forms(problem)


def derivatives_pay(problem: Problem) -> bool:
    """Whether the model's derivative along each source's gradient is cheaper, and can be had."""
    return 4 * problem.labels > problem.sources.count and can_differentiate(problem)


def _gram_forms(problem: Problem) -> Blocks:
    """Σ_y w_y ⟨g_i, ∇log f^y(x)⟩², from Gram matrices of per-sample gradients.

    One label y for each probe sample, or all of them with their probabilities as weights w_y.
    """
    for rows, first in problem.gradients(problem.sources, problem.memory // 2):
        for columns, terms in _probe_blocks(problem):
            shape = rows.stop - rows.start, columns.stop - columns.start
            values = torch.zeros(shape, dtype=torch.float64, device=problem.device)
            for second in terms:
                gram = torch.zeros_like(values)
                with torch.no_grad():
                    gram_matrix(gram, first, second, problem.parameters, problem.elements())
                values += gram.square_()
            yield rows, columns, values


def _probe_blocks(problem: Problem) -> Iterator[tuple[slice, Iterable[Block]]]:
    """Blocks of probe samples with the gradients at each label that counts, one after the other."""
    probe = problem.probe
    if probe.targets is not None:
        for columns, block in problem.gradients(probe, problem.memory // 4):
            yield columns, [block]
        return
    for columns in probe.blocks(problem.batch_size):
        m = columns.stop - columns.start
        with captured(problem.model, probe, columns) as batch:
            terms = (LabelTerm(problem, number) for number in range(problem.labels))
            yield columns, ([(slice(0, m), batch.gradients(term))] for term in terms)


class LabelTerm:
    """One label's log-probability at all samples, weighted by the root of its probability."""

    empty: frozenset[int] = frozenset()

    def __init__(self, problem: Problem, number: int) -> None:
        assert problem.head is not None
        self._head, self.loss, self._number = problem.head, problem.loss, number

    def __call__(self, outputs: Any, rows: Rows, alone: bool = False) -> Tensor:
        """The sum over the samples that the outputs are of."""
        terms = exact_terms(outputs, self._head.blank_targets(outputs), self.loss)
        return next(islice(terms, self._number, None))


def diagonal_forms(problem: Problem, verify: Verify) -> Tensor:
    """Σ_j a_jj g_ij² of every source (equation 9).

    Args:
        problem: What is measured; the probe's targets say that only these labels count.
        verify: How the Fisher diagonal is checked.

    Returns:
        Shape (n,).
    """
    probe, size = problem.probe, problem.batch_size
    targets = probe.targets if probe.targets is not None else problem.blank_targets()
    batches = [(part(probe.inputs, c), part(targets, c)) for c in probe.blocks(size)]
    kind = "exact" if probe.targets is None else "empirical"
    return source_squares(
        problem, fisher_diagonal(problem.model, batches, kind=kind, loss=probe.loss, verify=verify)
    )


def source_squares(problem: Problem, weights: dict[str, Tensor]) -> Tensor:
    """Σ_j w_j g_ij² of every source i.

    Args:
        problem: What is measured; the probe set is not looked at.
        weights: `{name: tensor of the parameter's shape}`.

    Returns:
        Shape (n,).
    """
    sources, found = problem.sources, []
    for rows in sources.blocks(problem.batch_size):
        with captured(problem.model, sources, rows) as batch:
            groups = batch.gradients(LossTerm(sources, rows))
            with torch.no_grad():
                total = torch.zeros(
                    rows.stop - rows.start, dtype=torch.float64, device=problem.device
                )
                found.append(weighted_squares(total, groups, weights))
    return torch.cat(found)
