"""Single operations on bare parameters, and the per-sample gradients that follow from them.

Matrix products (attention projections, functional layers, tied heads), and sums, products and
expansions over the samples (class tokens, position embeddings, layer scales, biases); and the same
of what is worked out from a parameter once for all samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradmask.fisher.calls import ALL, Call, full_precision, square_together
from gradmask.fisher.graph import Node
from gradmask.fisher.linear import add_linear_squares

Factor = Callable[[], Tensor | float]

# Operations that leave the order of the entries as it is.
RESHAPES = (
    "ViewBackward0",
    "UnsqueezeBackward0",
    "ReshapeAliasBackward0",
    "UnsafeViewBackward0",
    "ToCopyBackward0",
)


@dataclass(frozen=True)
class Layout:
    """Where the samples lie in results: (N, ...), (P, N, ...), or in the rows of a matrix.

    Attributes:
        samples: Samples in the batch, N.
        order: 0 if the samples come first, 1 if positions do.
    """

    samples: int
    order: int

    def dimension(self, shape: torch.Size) -> int | None:
        """The dimension of the samples (and positions) in a result of this shape, if any."""
        if len(shape) == 2:  # rows of samples, or of samples times positions
            return 0 if shape[0] and shape[0] % self.samples == 0 else None
        return self.order if len(shape) > self.order and shape[self.order] == self.samples else None

    def folds(self, shape: torch.Size) -> bool:
        """Whether samples and positions share a dimension."""
        return len(shape) == 2 and shape[0] != self.samples

    def samples_first(self, tensor: Tensor) -> Tensor:
        """A view with the samples in dimension 0 and nothing else in it."""
        if self.folds(tensor.shape):
            sizes = (self.samples, -1) if self.order == 0 else (-1, self.samples)
            rows: Tensor = tensor.unflatten(0, sizes)
            return rows.movedim(self.order, 0)
        return tensor if tensor.dim() == 2 else tensor.movedim(self.order, 0)


class OperationCall(Call):
    """An operation whose result has the samples where a layout says."""

    layout: Layout

    def rows(self, gradient: Tensor) -> Tensor:
        """The gradient of the result with the samples in dimension 0."""
        return self.layout.samples_first(gradient)


class ElementwiseCall(OperationCall):
    """A sum, product or expansion in which a bare parameter is repeated over the samples.

    Args:
        use: The parameter's name and shape.
        node: The operation.
        operand: Sizes that the parameter has in the result, without the dimension of the samples.
        factor: What the result's gradient is multiplied by.
        layout: Where the samples lie.
    """

    def __init__(
        self,
        use: tuple[str, torch.Size],
        node: Node,
        operand: tuple[int, ...],
        factor: Factor,
        layout: Layout,
    ) -> None:
        self.name, self.shape = use
        super().__init__({self.name: self.name}, [GradientEdge(node, 0)])
        self.kind = ("elementwise", layout.order, node.name(), operand)
        self.operand, self.factor, self.layout = operand, factor, layout

    def keep(self) -> None:
        """The other factor."""
        other = self.factor()
        self.factor = lambda: other

    def per_sample(self, samples: slice) -> dict[str, Tensor]:
        """The output's gradient times the other factor, summed over what was broadcast."""
        gradient, other = self.gradients[0], self.factor()
        assert gradient is not None
        g = full_precision(self.rows(gradient)[samples])
        if isinstance(other, Tensor):
            g = g * full_precision(self.rows(other.expand_as(gradient))[samples])
        elif other != 1:
            g = g * other
        repeated = [d for d, size in enumerate(self.operand, 1) if size == 1 and g.shape[d] > 1]
        summed = g.sum(repeated) if repeated else g
        return {self.name: summed.reshape(len(g), *self.shape)}

    def add_squares(self, totals: dict[str, Tensor], samples: slice = ALL) -> bool:
        """At once, so that the output's gradient need not be kept."""
        square_together([self], totals, self.layout.samples, samples)
        return True


class MatmulCall(OperationCall):
    """A product of matrices with a parameter on the right: rows @ W, or rows @ Wᵀ.

    Args:
        name: The parameter's name.
        node: The operation.
        transposed: Whether the parameter is transposed in it, as in a linear layer.
        layout: Where the samples lie.
    """

    def __init__(self, name: str, node: Node, transposed: bool, layout: Layout) -> None:
        super().__init__({name: name}, [GradientEdge(node, 0)])
        self.kind = ("matmul", layout.order, transposed)
        self.name, self.node, self.transposed, self.layout = name, node, transposed, layout
        self._saved: tuple[Tensor, float] | None = None

    def keep(self) -> None:
        """The other matrix."""
        self._saved = self._other()

    def _other(self) -> tuple[Tensor, float]:
        if self.node.name() == "MmBackward0":
            return self.node._saved_self, 1.0
        return self.node._saved_mat1, float(self.node._saved_alpha)

    def _pair(self, samples: slice) -> tuple[Tensor, Tensor]:
        """Inputs (n, P, D) and gradients (n, P, K) of a linear layer with this weight (K, D)."""
        g = self.gradients[0]
        assert g is not None
        x, alpha = self._saved or self._other()
        g = g if alpha == 1 else g * alpha
        rows = [full_precision(self.rows(t)[samples]) for t in (x.detach(), g)]
        x, g = (t.unsqueeze(1) if t.dim() == 2 else t for t in rows)
        return (x, g) if self.transposed else (g, x)

    def per_sample(self, samples: slice) -> dict[str, Tensor]:
        """Sum of the outer products over the positions."""
        x, g = self._pair(samples)
        return {self.name: g.mT @ x}

    def add_squares(self, totals: dict[str, Tensor], samples: slice = ALL) -> bool:
        """As a linear layer does."""
        add_linear_squares(totals[self.name], *self._pair(samples))
        return True


class DerivedCall(Call):
    """An operation on something worked out from a parameter alone, the same for all samples.

    A table of positions or distances that is looked up once for the batch, for example. What one
    sample's gradient is at that place goes down to the parameter by autograd.

    Args:
        call: The operation, with the name of the parameter.
        edge: Place in the graph of what it was given.
        leaf: The parameter's node.
    """

    def __init__(self, call: ElementwiseCall | MatmulCall, edge: GradientEdge, leaf: Node) -> None:
        super().__init__(call.names, call.edges)
        # Of other sizes in other batches, as sequences are longer or shorter.
        kind = tuple(len(k) if isinstance(k, tuple) else k for k in call.kind)
        self.kind = ("derived", edge.node.name(), kind)
        self.call, self.edge, self.leaf = call, edge, leaf

    def rows(self, gradient: Tensor) -> Tensor:
        """As of the operation."""
        return self.call.rows(gradient)

    def per_sample(self, samples: slice) -> dict[str, Tensor]:
        """A backward pass from what was derived to the parameter, for one sample at a time."""
        given = self.derived(samples).to(result(self.edge.node, self.edge.output_nr).dtype)
        edges = [self.edge], [GradientEdge(self.leaf, 0)]
        rows = [torch.autograd.grad(*edges, [g], retain_graph=True)[0] for g in given]
        return {self.call.name: torch.stack([full_precision(row.to_dense()) for row in rows])}

    def derived(self, samples: slice) -> Tensor:
        """Per-sample gradients of what was derived."""
        self.call.gradients = self.gradients
        return self.call.per_sample(samples)[self.call.name]


class LookupCall(DerivedCall):
    """An operation on rows of a table, the same for all samples: position embeddings."""

    def __init__(self, call: ElementwiseCall | MatmulCall, edge: GradientEdge, leaf: Node) -> None:
        super().__init__(call, edge, leaf)
        self.kind = ("lookup", *self.kind[1:])
        self.size = result(leaf).shape[0]
        self.table = reshaped(edge.node)
        self._places: tuple[Tensor, int] | None = None

    def keep(self) -> None:
        """The places, and the other factor."""
        self.call.keep()
        self._places = self.table._saved_indices, self.table._saved_padding_idx

    def rows_of_table(self, samples: slice) -> tuple[Tensor, Tensor]:
        """Places in the table, each once, and per-sample gradients (n, places, ...) there."""
        saved = self._places or (self.table._saved_indices, self.table._saved_padding_idx)
        keys, inverse = saved[0].flatten().unique(return_inverse=True)
        g = self.derived(samples)
        g = g.reshape(len(g), len(inverse), -1)
        found = g.new_zeros(len(g), len(keys), g.shape[2]).index_add_(1, inverse, g)
        if saved[1] < self.size:
            found[:, keys == saved[1]] = 0
        return keys, found

    def per_sample(self, samples: slice) -> dict[str, Tensor]:
        """Gradients of the rows that are looked up, and zeros."""
        keys, found = self.rows_of_table(samples)
        whole = found.new_zeros(len(found), self.size, found.shape[2])
        return {self.call.name: whole.index_copy_(1, keys, found)}

    def add_squares(self, totals: dict[str, Tensor], samples: slice = ALL) -> bool:
        """Of those rows alone."""
        keys, found = self.rows_of_table(samples)
        totals[self.call.name].index_add_(0, keys, found.square_().sum(0))
        return True


def reshaped(node: Node) -> Node:
    """What was reshaped to give this."""
    while node.name() in RESHAPES:
        node = node.next_functions[0][0]
    return node


def result(node: Node, index: int = 0) -> Any:
    """Shape and type of what an operation gave."""
    return node._input_metadata[index]
