"""An oracle by plain autograd, small models and data for the tests of the Fisher diagonal."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

CLASSES = 4


class Net(nn.Module):
    """A model from a function and its parts: `Net(lambda m, x: m.fc(x), fc=nn.Linear(2, 2))`."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, value in parts.items():
            setattr(self, name, value)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def readout(h):
    """Logits from any features (N, ...) without a parameter."""
    h = h.flatten(1).tanh()
    weight = torch.arange(h.shape[1] * CLASSES, device=h.device).cos().reshape(-1, CLASSES)
    return h @ weight.to(h.dtype)


def stack(*layers):
    """The layers one after the other, and a readout."""
    return Net(lambda m, x: readout(m.layers(x)), layers=nn.Sequential(*layers))


def randomise(model, dtype=torch.float64, noise=0.3):
    """Make no parameter or statistic special: neither zero nor one."""
    model.to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p += noise * torch.randn_like(p)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return model


def floats(*shape):
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


def tokens(*shape, vocabulary=6):
    return lambda n: torch.randint(vocabulary, (n, *shape))


def batches(inputs, sizes=(3, 2), classes=CLASSES, positions=()):
    return [(inputs(n), torch.randint(classes, (n, *positions))) for n in sizes]


def to_dtype(data, dtype):
    return tree_map(
        lambda t: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t, data
    )


def call(model, inputs):
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def cross_entropy(outputs, target):
    return F.cross_entropy(outputs, target, reduction="sum")


def bernoulli(outputs, target):
    return F.binary_cross_entropy_with_logits(outputs, target, reduction="sum")


def given(outputs, target):
    """The label of the data, with certainty."""
    yield 1.0, target


def all_labels(outputs, target):
    """Every labelling of every position, with the model's probability; logits (1, C, ...)."""
    p = outputs.detach().softmax(1).movedim(1, -1).reshape(-1, outputs.shape[1])
    for labels in itertools.product(range(p.shape[1]), repeat=len(p)):
        weight = math.prod(p[position, c].item() for position, c in enumerate(labels))
        yield weight, torch.tensor(labels).reshape(target.shape)


def all_bits(outputs, target):
    """Every outcome of independent coins, with the model's probability."""
    p = outputs.detach().sigmoid().flatten()
    for bits in itertools.product((0.0, 1.0), repeat=len(p)):
        y = torch.tensor(bits, dtype=p.dtype)
        yield (y * p + (1 - y) * (1 - p)).prod().item(), y.reshape(outputs.shape)


def oracle(model, data, loss=cross_entropy, labels=given):
    """Square the gradient of each sample's loss, for each labelling, and average over samples."""
    model.eval()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    count = 0
    for inputs, targets in data:
        for i in range(len(targets)):
            count += 1
            outputs = call(model, tree_map(lambda t, i=i: t[i : i + 1], inputs))
            for weight, target in labels(outputs, targets[i : i + 1]):
                gradients = torch.autograd.grad(
                    loss(outputs, target),
                    list(parameters.values()),
                    retain_graph=True,
                    allow_unused=True,
                )
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        total[name] += weight * gradient.to_dense() ** 2
    return {name: t / count for name, t in total.items()}


def assert_close(found, expected, tolerance=1e-10):
    """Largest error of each tensor, relative to its largest entry."""
    assert list(found) == list(expected)
    for name, b in expected.items():
        a = found[name]
        assert a.shape == b.shape, name
        assert not a.requires_grad, name
        error, scale = (a.to(b.dtype) - b).abs().max().item(), b.abs().max().item()
        assert error <= tolerance * scale, f"{name}: error {error:.2e} of {scale:.2e}"
