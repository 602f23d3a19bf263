"""Models small enough to work out a masked step by hand."""

import torch
from torch import nn

FIRST = {"weight": torch.tensor([[2.0, 1.0]])}  # at keep=0.5 only the first weight learns


def pair():
    """A model with the two weights 1 and 2."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    return model


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
