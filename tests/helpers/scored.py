"""A small network, its data, and the gradients of single samples."""

import torch
import torch.nn.functional as F
from torch import nn

from gradmask import SCORES

CLASSES = 3


def network(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, CLASSES)]
    return nn.Sequential(*layers).double()


def samples(seed, sizes=(5, 4)):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, 2, 4, 4, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (n,), generator=generator),
        )
        for n in sizes
    ]


def gradients(model, data):
    """Gradients of single samples, by plain autograd."""
    found = {name: [] for name, _ in model.named_parameters()}
    for inputs, targets in data:
        for x, y in zip(inputs, targets, strict=True):
            loss = F.cross_entropy(model(x[None]), y[None])
            grads = torch.autograd.grad(loss, list(model.parameters()))
            for name, g in zip(found, grads, strict=True):
                found[name].append(g)
    return {name: torch.stack(g) for name, g in found.items()}


def data_of(name):
    """What a score is measured on."""
    score = SCORES[name]
    options = {"protect": samples(2)} if score.compares else {}
    return (samples(1) if score.reads_data else None), options


def train(model, mask=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if mask is not None:
        mask.attach(optimizer)
    for inputs, targets in samples(1):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
