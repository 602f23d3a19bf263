"""A weight that is both an embedding's and a linear layer's, as most language models have it.

The embedding's gradient has a row for each token that a sample contains, so the square of the sum
is that of the linear layer, with another for those few rows: (l + e)² = l² + e (e + 2 l). Neither
gradient is formed as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradmask.fisher.calls import ALL, Call, LayerCall
from gradmask.fisher.linear import linear, tokens_of
from gradmask.fisher.rules import embedding, embedding_rows


def is_tied(calls: Sequence[Call]) -> bool:
    """Whether these are an embedding and a linear layer with the same weight, and no others."""
    rules = [c.rule.per_sample for c in calls if isinstance(c, LayerCall)]
    weights = {c.names.get("weight") for c in calls}
    return len(calls) == 2 and set(rules) == {embedding, linear} and len(weights) == 1


def add_tied_squares(
    calls: Sequence[Call], totals: dict[str, Tensor], samples: slice = ALL
) -> None:
    """Add the squares of the per-sample gradients of the shared weight, and of a bias.

    Args:
        calls: What `is_tied` said is so.
        totals: `{name: tensor of the parameter's shape}`, changed in place.
        samples: Those to add.
    """
    layers = [call for call in calls if isinstance(call, LayerCall)]
    table, last = sorted(layers, key=lambda call: call.rule.per_sample is linear)
    last.add_squares(totals, samples)
    module = table.module
    assert isinstance(module, nn.Embedding)
    keys, rows = embedding_rows(module, *table.pair(samples))
    x, g = map(tokens_of, last.pair(samples))
    products = torch.empty_like(rows)
    sample, token = keys // module.num_embeddings, keys % module.num_embeddings
    for n, (xn, gn) in enumerate(zip(x, g, strict=True)):
        own = sample == n
        products[own] = gn[:, token[own]].mT @ xn
    rows = rows * products.mul_(2).add_(rows)
    totals[last.names["weight"]].index_add_(0, token, rows)
