"""Language models and others for collectors."""

import torch
import torch.nn.functional as F
from cases import Net, floats, tokens
from torch import nn

from gradmask import FisherMask


def mean(outputs, targets):
    return F.cross_entropy(outputs, targets)


def run(model, inputs):
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def gradients(model, data, loss):
    model.zero_grad()
    for inputs, targets in data:
        loss(run(model, inputs), targets).backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def same(ours, theirs):
    return all(
        b is None if a is None else torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )


def collected(model, data, loss=mean, options=None, **settings):
    """What is collected in training passes, whose gradients stay as they are to the bit."""
    mask = FisherMask(model, **(options or {}))
    torch.manual_seed(1)
    expected = gradients(model, data, loss)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    before = hooks(model)
    with mask.collect(**settings) as collector:
        found = gradients(model, data, loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.keys() == expected.keys()
    assert same(found.values(), expected.values())
    assert hooks(model) == before
    return collector.diagonal()


def language_model(positions, tied):
    """Logits (N, C, T), with position embeddings of a table or a bare parameter."""

    def forward(m, x):
        places = torch.arange(x.shape[1])
        places = m.places(places) if positions == "table" else m.places
        h = m.norm(m.tokens(x) + places)
        return (h @ m.tokens.weight.T if tied else m.head(h)).mT

    parts = {"tokens": nn.Embedding(6, 5), "norm": nn.LayerNorm(5)}
    parts["places"] = nn.Embedding(9, 5) if positions == "table" else nn.Parameter(torch.ones(7, 5))
    if not tied:
        parts["head"] = nn.Linear(5, 6)
    return Net(forward, **parts)


image, vector, text = floats(2, 8, 8), floats(5), tokens(7)
