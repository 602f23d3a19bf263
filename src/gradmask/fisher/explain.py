"""Which captured calls explain a parameter completely."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from gradmask.fisher.calls import Call
from gradmask.fisher.graph import Node, enclosed
from gradmask.fisher.observe import Observer
from gradmask.fisher.operations import Layout
from gradmask.fisher.uses import operation_calls


def explanations(
    named: tuple[str, nn.Parameter],
    leaf: Node,
    parents: dict[Node, list[Node]],
    roots: set[Node],
    observer: Observer,
) -> Iterator[list[Call]]:
    """Calls that explain a parameter completely, the cheapest kind first.

    Args:
        named: The parameter's name and the parameter.
        leaf: Its node in the graph.
        parents: `{node: parents}` of the graph.
        roots: Nodes of what is differentiated.
        observer: The calls of layers and modules.

    Yields:
        The calls, by each strategy there is.
    """
    name, parameter = named

    def explain(calls: Sequence[Call]) -> bool:
        outputs = {edge.node for call in calls for edge in call.edges}
        inputs = {node for call in calls for node in call.inputs}
        return bool(calls) and enclosed(leaf, outputs, inputs, parents, roots)

    layers = list(dict.fromkeys(observer.layers.get(name, ())))
    if explain(layers):
        yield list(layers)
    # Operations alone, or together with calls of layers where these are one operation each.
    found = {call.edges[0].node: call for call in layers}
    layouts = [Layout(observer.batch_size, order) for order in (0, 1)]
    for derived in (False, True) if observer.batch_size > 1 else (False,):
        for explained in (found, {}) if found else ({},):
            for layout in layouts:
                yield operation_calls(
                    name, leaf, parents, roots, layout, explained, derived=derived
                )
    # Hooks fire for inner modules first: the innermost module that encloses the parameter.
    for module in dict.fromkeys(call.module for call in observer.modules):
        if any(parameter is p for p in module.parameters()):
            calls = [call for call in observer.modules if call.module is module]
            if all(call.is_sound(parents) for call in calls) and explain(calls):
                yield list(calls)
