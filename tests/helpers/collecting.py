"""Networks that train with a collector beside."""

import torch
import torch.nn.functional as F
from torch import nn


def network(dropout=0.0, dtype=torch.float64):
    torch.manual_seed(0)
    layers = (nn.Linear(5, 7), nn.LayerNorm(7), nn.ReLU(), nn.Dropout(dropout), nn.Linear(7, 3))
    return nn.Sequential(*layers).to(dtype)


def batches(count=3, size=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count * size, 5, generator=generator, dtype=dtype)
    y = torch.randint(0, 3, (count * size,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def close(found, expected, rtol=1e-9):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=1e-20, msg=name)


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
}
