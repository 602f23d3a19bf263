"""Walks over the autograd graph of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gradmask.errors import ModelError

Node = Any  # torch.autograd.graph.Node, which has no public attributes to type


def walk(roots: Sequence[Node]) -> tuple[list[Node], dict[Node, list[Node]]]:
    """All nodes below the roots, children before parents, and the parents of each.

    Args:
        roots: Nodes of the model's outputs, each once.

    Returns:
        The nodes in order, and `{node: parents}`.

    Raises:
        ModelError: If a part of the graph is hidden.
    """
    order: list[Node] = []
    parents: dict[Node, list[Node]] = {root: [] for root in roots}
    stack: list[tuple[Node, bool]] = [(root, False) for root in roots]
    opened: set[Node] = set()
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in opened:
            opened.add(node)
            if node.name() == "CheckpointFunctionBackward":
                raise ModelError(
                    "Reentrant activation checkpointing hides the layers inside it: "
                    "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
                )
            stack.append((node, True))
            for child, _ in node.next_functions:
                if child is not None:
                    parents.setdefault(child, []).append(node)
                    stack.append((child, False))
    return order, parents


def enclosed(
    leaf: Node,
    outputs: set[Node],
    inputs: set[Node],
    parents: dict[Node, list[Node]],
    roots: set[Node],
) -> bool:
    """Whether every path from a leaf up to the roots leaves the calls it belongs to by an output.

    A path that meets a call by way of its input comes from some other use of the leaf.

    Args:
        leaf: Node of a parameter.
        outputs: Nodes of the outputs of all calls that own the parameter.
        inputs: Nodes of their inputs.
        parents: `{node: parents}`.
        roots: Nodes of the model's outputs.

    Returns:
        True if the calls explain the parameter completely.
    """
    stack, seen = [leaf], {leaf}
    while stack:
        node = stack.pop()
        if node in outputs:
            continue
        if node in roots or node in inputs:
            return False
        for parent in parents[node]:
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return True


def lowest(order: list[Node], captured: set[Node]) -> set[Node]:
    """Captured nodes with no captured node below: a backward pass to these runs all the others.

    Args:
        order: All nodes, children before parents.
        captured: Those whose gradients are wanted.

    Returns:
        The lowest of them.
    """
    contains: dict[Node, bool] = {}
    found = set()
    for node in order:
        below = any(contains[child] for child, _ in node.next_functions if child is not None)
        if node in captured and not below:
            found.add(node)
        contains[node] = below or node in captured
    return found


def leaves(order: Iterable[Node], name_of: Callable[[Any], str | None]) -> dict[str, Node]:
    """The node of each named parameter that the graph reaches."""
    found = {}
    for node in order:
        variable = getattr(node, "variable", None)
        name = None if variable is None else name_of(variable)
        if name is not None:
            found[name] = node
    return found


# Words in the names of operations that choose entries by data.
_SELECTIONS = ("Index", "Gather", "Scatter", "MaskedSelect", "MaskedScatter", "Pack", "Take")


def rearranges(order: Iterable[Node], samples: int) -> bool:
    """Whether samples may change places by their data, in this batch if not in another.

    That is where entries are chosen by data, or cut and joined along a dimension that holds the
    samples, at places that may depend on the data.

    Args:
        order: Nodes of the graph.
        samples: Samples in the batch.
    """
    return any(
        any(word in node.name() for word in _SELECTIONS) or _cuts(node, samples) for node in order
    )


def _cuts(node: Node, samples: int) -> bool:
    """Whether an operation has dimension 0 for its own, and that is as long as whole samples."""
    if getattr(node, "_saved_dim", None) != 0:
        return False
    sizes = getattr(node, "_saved_self_sym_sizes", None)
    results = node._input_metadata
    if not sizes:
        sizes = [len(results)] if node.name() == "UnbindBackward0" else results[0].shape
    return bool(sizes) and sizes[0] % samples == 0


def structure(order: Iterable[Node]) -> int:
    """A number that tells graphs of other operations apart."""
    return hash(tuple(node.name() for node in order))
