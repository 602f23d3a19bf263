"""Which single operations a bare parameter goes into, read off the autograd graph.

The graph does not say where the samples lie in a result: first (N, P, ...) or second (P, N, ...),
perhaps folded into rows. Both are offered; a probe tells which is right.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradmask.fisher.calls import Call
from gradmask.fisher.graph import Node
from gradmask.fisher.operations import (
    RESHAPES,
    DerivedCall,
    ElementwiseCall,
    Factor,
    Layout,
    LookupCall,
    MatmulCall,
    reshaped,
    result,
)

_TRANSPOSES = ("TBackward0", "TransposeBackward0", "PermuteBackward0")
_PRODUCTS = ("MmBackward0", "AddmmBackward0")
_DERIVED = 64  # operations that a parameter may go through before it meets the samples


def operation_calls(
    name: str,
    leaf: Node,
    parents: dict[Node, list[Node]],
    roots: set[Node],
    layout: Layout,
    explained: Mapping[Node, Call],
    *,
    derived: bool = False,
) -> list[Call]:
    """Explain every use of a bare parameter by single operations, if that is what they are.

    Args:
        name: The parameter's name.
        leaf: Its node.
        parents: `{node: parents}` of the graph.
        roots: Nodes of what is differentiated.
        layout: Where the samples may lie in the results.
        explained: Calls of layers with this parameter that consist of one operation.
        derived: Whether what they use may be worked out from the parameter by others.

    Returns:
        The operations (and calls); none if some use is of another kind.
    """
    found: list[Call] = []
    shape = torch.Size(result(leaf).shape)
    stack, seen = [(leaf, shape, False, False)], {leaf}
    while stack:
        child, form, transposed, changed = stack.pop()
        for node in dict.fromkeys(parents[child]):
            if node in explained and not changed:
                found.append(explained[node])
                continue
            output = result(node)
            if output.dtype.is_complex or len(seen) > _DERIVED:
                return []
            size = torch.Size(output.shape)
            flips = node.name() in _TRANSPOSES and size == form[::-1] and len(size) == 2
            reshapes = node.name() in RESHAPES and not transposed
            if not changed and (flips or (reshapes and form.numel() == size.numel())):
                if node in roots:
                    return []
                seen.add(node)
                stack.append((node, size, transposed != flips, False))
                continue
            calls: list[Call] = []
            for place, (below, index) in enumerate(node.next_functions):
                if below is child:
                    operand = torch.Size(result(child, index).shape)
                    use = name, operand if changed else shape
                    call = _call(use, node, place, (operand, transposed), layout)
                    if call is None:
                        break
                    edge = GradientEdge(child, index)
                    calls.append(_derived(call, edge, leaf) if changed else call)
            else:
                found += calls
                continue
            if not derived or node in roots:
                return []
            if node not in seen:
                seen.add(node)
                stack.append((node, size, False, True))
    return found


def _derived(call: ElementwiseCall | MatmulCall, edge: GradientEdge, leaf: Node) -> DerivedCall:
    node = reshaped(edge.node)
    rows = node.name() == "EmbeddingBackward0" and node.next_functions[0][0] is leaf
    simple = rows and not (node._saved_scale_grad_by_freq or _read_once(node, "indices"))
    return (LookupCall if simple else DerivedCall)(call, edge, leaf)


def _call(
    use: tuple[str, torch.Size],
    node: Node,
    place: int,
    operand: tuple[torch.Size, bool],
    layout: Layout,
) -> ElementwiseCall | MatmulCall | None:
    """The call of an operation on a parameter, if it is of a known kind.

    Args:
        use: The parameter's name and shape.
        node: The operation.
        place: Which operand is the parameter.
        operand: The shape it has there, and whether it is transposed.
        layout: Where the samples may lie in the result.
    """
    (name, shape), (form, transposed) = use, operand
    if node.name() in _PRODUCTS and place == len(node.next_functions) - 1:
        if _read_once(node, "self" if node.name() == "MmBackward0" else "mat1"):
            return None
        whole = form == (shape[::-1] if transposed else shape)
        fits = whole and layout.dimension(torch.Size(result(node).shape)) is not None
        return MatmulCall(name, node, transposed, layout) if fits else None
    return _elementwise(use, node, place, None if transposed else form, layout)


def _elementwise(
    use: tuple[str, torch.Size],
    node: Node,
    place: int,
    operand: torch.Size | None,
    layout: Layout,
) -> ElementwiseCall | None:
    output, factor = torch.Size(node._input_metadata[0].shape), _factor(node, place)
    at = layout.dimension(output)
    if operand is None or factor is None or at is None:
        return None
    sizes = (1,) * (len(output) - len(operand)) + tuple(operand)
    if len(sizes) != len(output) or sizes[at] != 1:
        return None
    rest = (1,) * layout.folds(output) + sizes[:at] + sizes[at + 1 :]
    return ElementwiseCall(use, node, rest, factor, layout)


def _factor(node: Node, place: int) -> Factor | None:
    """What the gradient of an operation's output is multiplied by on its way to an operand."""
    kind = node.name()
    if kind == "ExpandBackward0":
        return lambda: 1.0
    if kind == "AddmmBackward0" and place == 0:
        return lambda: float(node._saved_beta)
    if kind == "AddBackward0":
        return lambda: 1.0 if place == 0 else float(node._saved_alpha)
    if kind == "SubBackward0":
        return lambda: 1.0 if place == 0 else -float(node._saved_alpha)
    if kind == "MulBackward0":
        other = "other" if place == 0 else "self"
        if not _read_once(node, other):
            return lambda: getattr(node, f"_saved_{other}").detach()
    if kind == "NativeLayerNormBackward0" and place:  # in modules of their own
        if place == 2:
            return lambda: 1.0
        if not _read_once(node, "input"):
            return lambda: _normalised(node)
    return None


def _normalised(node: Node) -> Tensor:
    x, mean, inverse = node._saved_input, node._saved_result1, node._saved_result2
    normalised: Tensor = (x.detach() - mean) * inverse
    return normalised


def _read_once(node: Node, name: str) -> bool:
    """Whether a saved tensor is for autograd's eyes only, as activation checkpointing has it."""
    saved = getattr(node, f"_raw_saved_{name}", None)
    return type(getattr(saved, "data", None)).__name__ == "_Holder"
