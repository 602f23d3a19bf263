"""A linear layer whose half is masked, and how its weights move."""

import torch
from torch import nn

from gradmask import FisherMask


def linear(inputs=4, outputs=3):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs)


def half_masked(model, optimizer=None, **options):
    """A mask that keeps the first half of the entries of every parameter, set by hand."""
    mask = FisherMask(model, **options)
    if optimizer is not None:
        mask.attach(optimizer)
    mask.masks = {
        name: (torch.arange(p.numel()) < p.numel() / 2).view(p.shape)
        for name, p in model.named_parameters()
    }
    return mask


def fill(model, value=1.0):
    for p in model.parameters():
        p.grad = torch.full_like(p, value)


def same(ours, theirs):
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)
