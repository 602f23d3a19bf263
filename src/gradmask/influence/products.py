"""Products of per-sample gradients, group by group of layers: none is kept longer than it is used.

Gram matrix: G_ij = ⟨g_i, h_j⟩ of two batches. Weighted squares: s_i = Σ_j a_j g_ij².
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gradmask.fisher.calls import Call, LayerCall, per_sample_together
from gradmask.fisher.rules import chunk_size
from gradmask.influence.samples import Groups, Parameters, same_groups


def gram_matrix(total: Tensor, a: Groups, b: Groups, parameters: Parameters, size: int) -> Tensor:
    """Inner products of the per-sample gradients of two batches.

    Args:
        total: Zeros of shape (samples of a, samples of b).
        a: One batch.
        b: The other batch.
        parameters: The parameters.
        size: Elements of per-sample gradients that may be held at a time, of each batch.

    Returns:
        `total`, filled in place.
    """
    a, b = same_groups(a, b)
    for names, first in a.items():
        second = b[names]
        if not _add_outer(total, first, second):
            elements = sum(parameters[name].numel() for name in names)
            _add_formed(total, first, second, max(1, size // elements))
    return total


def _outer(group: Sequence[Call]) -> tuple[dict[str, str], Tensor, Tensor] | None:
    """Names and factors of a linear layer whose weight gradients have rank one."""
    if len(group) != 1 or not isinstance(group[0], LayerCall):
        return None
    factors = group[0].outer_factors()
    return None if factors is None else (group[0].names, *factors)


def _add_outer(total: Tensor, a: Sequence[Call], b: Sequence[Call]) -> bool:
    """⟨g xᵀ, h zᵀ⟩ = ⟨g, h⟩⟨x, z⟩, and ⟨g, h⟩ for the bias."""
    first, second = _outer(a), _outer(b)
    if first is None or second is None or first[0] != second[0]:
        return False
    (names, x, g), (_, z, h) = first, second
    outputs = g @ h.T
    if "weight" in names:
        total += (x @ z.T) * outputs
    if "bias" in names:
        total += outputs
    return True


def _add_formed(total: Tensor, a: Sequence[Call], b: Sequence[Call], chunk: int) -> None:
    n, m = total.shape
    for i in range(0, n, chunk):
        rows = slice(i, min(i + chunk, n))
        first = per_sample_together(a, rows)
        for j in range(0, m, chunk):
            columns = slice(j, min(j + chunk, m))
            second = per_sample_together(b, columns)
            for name in first.keys() & second.keys():  # elsewhere one of them is zero
                total[rows, columns] += first[name].flatten(1) @ second[name].flatten(1).T


def weighted_squares(total: Tensor, groups: Groups, weights: dict[str, Tensor]) -> Tensor:
    """Sum over all entries of the weights times the squared per-sample gradients.

    Args:
        total: Zeros of shape (samples,).
        groups: The batch.
        weights: `{name: tensor of the parameter's shape}`.

    Returns:
        `total`, filled in place.
    """
    for names, group in groups.items():
        outer = _outer(group)
        if outer is not None:
            local, x, g = outer
            squares = g.square()
            if "weight" in local:
                total += ((squares @ weights[local["weight"]]) * x.square()).sum(1)
            if "bias" in local:
                total += squares @ weights[local["bias"]]
            continue
        chunk = chunk_size(weights[name] for name in names)
        for start in range(0, len(total), chunk):
            rows = slice(start, min(start + chunk, len(total)))
            for name, gradient in per_sample_together(group, rows).items():
                total[rows] += gradient.square().flatten(1) @ weights[name].flatten()
    return total
