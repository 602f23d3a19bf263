"""What `mask.collect()` refuses, and what errors leave behind."""

import pytest
import torch
import torch.nn.functional as F
from collecting import batches, close, hooks, loss_of, network
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradmask import FisherMask, fisher_diagonal
from gradmask.errors import DataError, GradmaskError, ModelError, OptionError


class Fails(nn.Module):
    def forward(self, x):
        if x.shape[0] == 3:
            raise RuntimeError("mine")
        return x


def step(model, x, y, place):
    outputs = model(x)
    if place == "between":
        raise RuntimeError("mine")
    if place == "backward":
        model[0].weight.register_hook(fail)
    if place == "hook":
        outputs.register_hook(fail)
    F.cross_entropy(outputs, y).backward()


def fail(_):
    raise RuntimeError("mine")


@pytest.mark.parametrize("size", [2, 1])
@pytest.mark.parametrize("place", ["forward", "between", "backward", "hook"])
def test_errors_leave_no_hooks(place, size):
    model = network().append(Fails())
    batch = batches(1, 3 if place == "forward" else size)[0]
    collector = FisherMask(model).collect()
    with pytest.raises(RuntimeError, match="mine"), collector:
        step(model, *batch, place)
    assert hooks(model) == 0
    model[0].weight._backward_hooks = None
    batch = batches(1)[0]
    with collector:
        loss_of(model, batch).backward()
    close(collector.diagonal(), fisher_diagonal(model, [batch]))


def reentrant():
    first, inner = nn.Linear(5, 5), network()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = first.double(), inner

        def forward(self, x):
            return checkpoint(self.inner, self.first(x), use_reentrant=True)

    return Model()


def compiled():
    model = network()
    model.compile(backend="eager")
    return model


REFUSED = {
    "BatchNorm": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double(),
        r"'1' \(BatchNorm1d\).*GroupNorm or LayerNorm, or keep the layer in eval mode",
    ),
    "mixing": (
        lambda: network().append(nn.Softmax(0)),
        r"No rule measures .*mask\.refresh\(loader\)",
    ),
    "reentrant": (reentrant, "Reentrant activation checkpointing"),
    "compiled": (lambda: torch.compile(network(), backend="eager"), "leave torch.compile out"),
    "compiled in place": (compiled, "leave torch.compile out"),
    "a compiled part": (
        lambda: nn.Sequential(torch.compile(network(), backend="eager")),
        "leave torch.compile out",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_models_that_are_refused(make, message):
    model, (batch,) = make(), batches(1)
    with pytest.raises(ModelError, match=message), FisherMask(model).collect():
        loss_of(model, batch).backward()
    assert hooks(model) == 0


class WithScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs, targets):
        return F.cross_entropy(outputs * self.scale, targets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sampled"}, "draws labels of its own"),
        ({"kind": "exact"}, "draws labels of its own"),
        ({"loss": WithScale()}, r"parameters of its own \(loss\.scale\)"),
    ],
)
def test_masks_that_cannot_collect(options, message):
    with pytest.raises(GradmaskError, match=message):
        FisherMask(network(), **options).collect()
    with pytest.raises(GradmaskError, match=message):
        FisherMask(network(), **options, refresh="online")


@pytest.mark.parametrize(
    "options",
    [
        *({"every": 0}, {"every": 1.5}, {"every": True}),
        *({"average": 1.0}, {"average": -0.1}, {"average": float("nan")}),
        *({"scale": 0.0}, {"scale": float("nan")}),
    ],
    ids=str,
)
def test_options_out_of_range(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        FisherMask(network()).collect(**options)


def test_other_mistakes():
    model = network()
    fixed = FisherMask.from_masks(
        model, {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    )
    with pytest.raises(OptionError, match="fixed"):
        fixed.collect()
    with pytest.raises(OptionError, match="needs a loader"):
        FisherMask(model).refresh()
    with pytest.raises(OptionError, match="refresh"):
        FisherMask(model, refresh="onlin")
    mask = FisherMask(model, refresh="online")
    with pytest.raises(DataError, match="Nothing was collected"):
        mask.refresh()
    assert mask.refreshes == 0
