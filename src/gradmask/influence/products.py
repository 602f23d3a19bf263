"""Products of per-sample gradients, layer by layer: none is formed for longer than it is used.

Gram matrix: G_ij = ⟨g_i, h_j⟩ of two sets. Weighted squares: s_i = Σ_j a_j g_ij².
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradmask.fisher.calls import Call, LayerCall, per_sample_together
from gradmask.fisher.rules import Product, chunk_size, squared
from gradmask.influence.guard import Groups, Parameters
from gradmask.influence.samples import Block, same_groups

# Calls that explain the same parameters, for the samples of a block in each slice.
Parts = Sequence[tuple[slice, Sequence[Call]]]


def gram_matrix(total: Tensor, a: Block, b: Block, parameters: Parameters, size: int) -> Tensor:
    """Inner products of the per-sample gradients of two blocks.

    Args:
        total: Zeros of shape (samples of a, samples of b).
        a: One block.
        b: The other block.
        parameters: The parameters.
        size: Elements of per-sample gradients that may be formed at a time, of each block.

    Returns:
        `total`, filled in place.
    """
    a, b = same_groups(a, b)
    for names in a[0][1]:
        first, second = ([(rows, groups[names]) for rows, groups in block] for block in (a, b))
        if not _add_products(total, first, second, parameters, size):
            _add_formed(total, first, second, parameters, size)
    return total


class _Layer:
    """One layer's per-sample gradients in a block, as products of matrices.

    Attributes:
        names: The model's names of `weight` and `bias`.
        products: The products, for the samples in each slice.
        count: Samples.
    """

    def __init__(self, names: dict[str, str], products: list[tuple[slice, Product]]) -> None:
        self.names, self.products = names, products
        self.count = products[-1][0].stop

    @property
    def positions(self) -> int:
        """Positions of a sample."""
        return self.products[0][1].deltas.shape[-1]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Rows for each position of each sample: of the deltas, and of what they multiply."""
        deltas = torch.cat([p.deltas.mT.flatten(0, 1) for _, p in self.products])
        inputs = torch.cat([p.unfold(p.inputs).mT.flatten(0, 1) for _, p in self.products])
        return deltas, inputs

    def columns(self, channels: slice) -> Tensor:
        """The gradients of the weight's columns of some input channels, shape (samples, ...)."""
        found: Tensor | None = None
        for rows, product in self.products:
            patches = product.unfold(product.inputs[:, channels])
            if found is None:
                shape = self.count, product.deltas.shape[1], patches.shape[1]
                found = patches.new_empty(shape)
            torch.bmm(product.deltas, patches.mT, out=found[rows])
        assert found is not None
        return found.flatten(1)

    def bias(self) -> Tensor:
        """The gradients of the bias, shape (samples, K)."""
        return torch.cat([p.deltas.sum(-1) for _, p in self.products])


def _layer(parts: Parts) -> _Layer | None:
    products = []
    for rows, calls in parts:
        call = calls[0]
        product = call.as_product() if len(calls) == 1 and isinstance(call, LayerCall) else None
        if product is None or call.names != parts[0][1][0].names:
            return None
        products.append((rows, product))
    return _Layer(parts[0][1][0].names, products)


def _add_products(total: Tensor, a: Parts, b: Parts, parameters: Parameters, size: int) -> bool:
    """By products of matrices; False if a layer does not have them."""
    first, second = _layer(a), _layer(b)
    if first is None or second is None or first.names != second.names:
        return False
    if "bias" in first.names:
        total += first.bias() @ second.bias().T
    if "weight" in first.names:
        weight = parameters[first.names["weight"]]
        outputs, inputs = len(weight), weight[0].numel()
        pairs = first.positions * second.positions
        if pairs * (outputs + inputs) <= outputs * inputs:
            _add_by_positions(total, first, second)
        else:
            _add_by_columns(total, first, second, size // outputs * len(weight[0]) // inputs)
    return True


def _add_by_positions(total: Tensor, a: _Layer, b: _Layer) -> None:
    """Σ_pq ⟨g_p, h_q⟩⟨x_p, z_q⟩ over pairs of positions: no gradient is formed."""
    right = b.factors()
    for rows, product in a.products:
        left = _Layer(a.names, [(rows, product)]).factors()
        outputs, inputs = (one @ other.T for one, other in zip(left, right, strict=True))
        pairs = outputs.mul_(inputs).view(-1, a.positions, b.count, b.positions)
        total[rows] += pairs.sum((1, 3))


def _add_by_columns(total: Tensor, a: _Layer, b: _Layer, size: int) -> None:
    """⟨Σ_p g_p x_pᵀ, Σ_q h_q z_qᵀ⟩, for as many input channels at a time as fit."""
    channels = a.products[0][1].inputs.shape[1]
    step = max(1, size // max(a.count, b.count))
    for start in range(0, channels, step):
        which = slice(start, start + step)
        total += a.columns(which) @ b.columns(which).T


def _add_formed(total: Tensor, a: Parts, b: Parts, parameters: Parameters, size: int) -> None:
    names = {name for _, calls in (*a, *b) for call in calls for name in call.names.values()}
    chunk = max(1, size // max(1, sum(parameters[name].numel() for name in names)))
    n, m = total.shape
    for i in range(0, n, chunk):
        rows = slice(i, min(i + chunk, n))
        first = _formed(a, rows)
        for j in range(0, m, chunk):
            columns = slice(j, min(j + chunk, m))
            second = _formed(b, columns)
            for name in first.keys() & second.keys():  # elsewhere one of them is zero
                total[rows, columns] += first[name] @ second[name].T


def _formed(parts: Parts, wanted: slice) -> dict[str, Tensor]:
    """Per-sample gradients `{name: (samples wanted, elements)}`."""
    found: dict[str, Tensor] = {}
    for rows, calls in parts:
        start, stop = max(rows.start, wanted.start), min(rows.stop, wanted.stop)
        if start >= stop:
            continue
        own = slice(start - rows.start, stop - rows.start)
        for name, gradient in per_sample_together(calls, own).items():
            # Of complex gradients the real part of ⟨g, h⟩: that of their parts side by side.
            real = torch.view_as_real(gradient) if gradient.is_complex() else gradient
            flat = real.reshape(len(gradient), -1)
            if own.stop - own.start == wanted.stop - wanted.start:
                found[name] = flat
                continue
            if name not in found:
                found[name] = flat.new_zeros(wanted.stop - wanted.start, flat.shape[1])
            found[name][start - wanted.start : stop - wanted.start] = flat
    return found


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
        call = group[0]
        if len(group) == 1 and isinstance(call, LayerCall):
            values = call.weigh_squares(weights)
            if values is not None:
                total += values
                continue
        chunk = chunk_size(weights[name] for name in names)
        for start in range(0, len(total), chunk):
            rows = slice(start, min(start + chunk, len(total)))
            for name, gradient in per_sample_together(group, rows).items():
                squares = squared(gradient).reshape(len(gradient), -1)
                total[rows] += squares @ weights[name].flatten()
    return total
