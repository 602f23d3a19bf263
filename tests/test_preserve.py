"""A model is left as it was, whatever its forward pass does, also after an error."""

import copy
from collections import deque
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from gradmask import (
    FisherMask,
    InfluenceMonitor,
    fisher_diagonal,
    gradient_norms,
    influence,
    preserve,
)
from gradmask.errors import GradmaskError, ModelError


class Model(nn.Module):
    """Changes a part of itself in every forward pass."""

    def __init__(self, change=lambda m, x: None, **parts):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.change = change
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("ema", torch.zeros(4))
        self.register_buffer("none", None)
        self.count, self.log, self.cache = 0, [], {"seen": deque([1]), "set": {1}}
        self.kept = torch.zeros(3)
        self.state = SimpleNamespace(calls=0, last=None)
        self.generator = torch.Generator().manual_seed(3)
        for name, value in parts.items():
            setattr(self, name, value)

    def forward(self, x):
        h = self.fc(x)
        with torch.no_grad():
            self.change(self, x)
        return h


def buffers(m, x):
    m.steps += 1
    m.ema.mul_(0.9).add_(m.fc(x).mean(0), alpha=0.1)


def new_buffer(m, x):
    m.ema = m.ema + 1
    m.none = torch.ones(2)


def resized_buffer(m, x):
    m.ema.resize_(9).zero_()


def attributes(m, x):
    m.count += 1
    m.fresh = x
    m.kept = m.kept + 1


def contents(m, x):
    m.log.append(x)
    m.cache["x"] = x
    m.cache["seen"].append(2)
    m.cache["set"].add(len(x))
    m.kept += 1


def objects(m, x):
    m.state.calls += 1
    m.state.last = x
    torch.rand(1, generator=m.generator)


def new_module(m, x):
    m.lazy = nn.Linear(2, 2)


def shrunk_weight(m, x):
    m.fc.weight.mul_(0.9)


def shrunk_data(m, x):
    m.fc.weight.data.mul_(0.9)


def removed(m, x):
    if hasattr(m, "kept"):
        del m.kept


CHANGES = [
    buffers,
    new_buffer,
    resized_buffer,
    attributes,
    contents,
    objects,
    new_module,
    shrunk_weight,
    shrunk_data,
    removed,
]


class Named(nn.Module):
    def __init__(self, net, **aliases):
        super().__init__()
        self.net = net
        for name, module in aliases.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.net(x)


def with_alias():
    shared = nn.Linear(3, 3)
    return Named(nn.Sequential(nn.Linear(3, 3), shared, nn.Tanh(), nn.Linear(3, 4)), layer=shared)


def alias_first():
    shared = nn.Linear(3, 3)
    model = nn.Module.__new__(Named)
    nn.Module.__init__(model)
    model.layer = shared
    model.net = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(3, 4))
    return model


def tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 4))
    net[2].weight = net[0].weight
    return net


MODELS = {
    "alias": with_alias,
    "alias-first": alias_first,
    "list-of-one": lambda: nn.Sequential(*[nn.Linear(3, 3)] * 3, nn.Linear(3, 4)),
    "tied": tied,
    "parametrized": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(3, 3)),
        parametrizations.orthogonal(nn.Linear(3, 3)),
        nn.Linear(3, 4),
    ),
    "old-weight-norm": lambda: nn.Sequential(weight_norm(nn.Linear(3, 3)), nn.Linear(3, 4)),
    "old-spectral-norm": lambda: nn.Sequential(spectral_norm(nn.Linear(3, 3)), nn.Linear(3, 4)),
    "recurrent": lambda: Named(Recurrent()),
    "batch-norm": lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 4)),
}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(3, 3, batch_first=True), nn.Linear(3, 4)

    def forward(self, x):
        return self.out(self.rnn(x[:, None])[0][:, 0])


CALLS = {
    "fisher": lambda m, d: fisher_diagonal(m, [d, d]),
    "sampled": lambda m, d: fisher_diagonal(m, [d], kind="sampled", max_samples=3),
    "norms": gradient_norms,
    "quadratic": lambda m, d: influence(m, d, d[0]),
    "kl": lambda m, d: influence(m, d, d[0], method="kl", step=0.5),
    "diagonal": lambda m, d: influence(m, d, d[0], method="diagonal"),
    "empirical": lambda m, d: influence(m, d, d, fisher="empirical"),
    "monitor": lambda m, d: InfluenceMonitor(m, [d], sources=2, probe=3).step(),
    "refresh": lambda m, d: FisherMask(m, keep=0.5).refresh([d]),
}


def data(n=5):
    return torch.randn(n, 3, dtype=torch.float64), torch.arange(n) % 4


def frozen(value, depth=4):
    """A form of nested state that compares equal if its bits and identities are the same."""
    if isinstance(value, torch.Tensor):
        return id(value), value.detach().clone().tolist(), type(value)
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, dict):
        return {key: frozen(v, depth - 1) for key, v in value.items()} if depth else None
    if isinstance(value, list | tuple | deque):
        return type(value), [frozen(v, depth - 1) for v in value]
    if isinstance(value, SimpleNamespace):
        return frozen(vars(value))
    return (id(value), value) if isinstance(value, int | str | set | None | bool) else id(value)


def state(model):
    return {
        name: {
            "own": {
                k: frozen(v) for k, v in vars(m).items() if "hook" not in k and k != "_modules"
            },
            "modules": [(k, id(v)) for k, v in m._modules.items()],
        }
        for name, m in model.named_modules(remove_duplicate=False)
    }


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_forward_changes_is_put_back(change, call, repeatable):
    model = Model(change).double()
    before, copied = state(model), copy.deepcopy(model.state_dict())
    refused = pytest.raises(ModelError, match=r"other outputs each time|reference of its own")
    with refused if "shrunk" in change.__name__ else nullcontext():
        CALLS[call](model, data())
    assert state(model) == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, copied[name])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", MODELS)
def test_aliases_ties_and_parametrizations(case, call, repeatable):
    model = MODELS[case]().double()
    model(data()[0])
    before, places = state(model), parameters(model)
    CALLS[call](model, data())
    assert state(model) == before
    assert parameters(model) == places


def parameters(model):
    return {
        n: (id(p), p.tolist(), type(p)) for n, p in model.named_parameters(remove_duplicate=False)
    }


class Failure(RuntimeError):
    pass


@pytest.mark.parametrize("error", [Failure, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("call", CALLS)
def test_after_a_failure(call, at, error, repeatable):
    calls = [0]

    def change(m, x):
        contents(m, x)
        shrunk_weight(m, x)
        calls[0] += 1
        if calls[0] >= at:
            raise error

    model = Model(change).double()
    before = state(model)
    try:
        CALLS[call](model, data())
    except error:
        pass
    except ModelError:  # of a forward pass that changes weights, before it fails
        assert calls[0] < at
    else:
        assert calls[0] < at
    assert state(model) == before


def test_influence_is_right_with_an_alias(repeatable):
    for build in (with_alias, alias_first):
        model = build().double()
        plain = copy.deepcopy(model)
        del plain.layer
        for options in ({}, {"method": "kl", "step": 0.5}, {"method": "diagonal"}):
            sources, probe = data(3), torch.randn(2, 3, dtype=torch.float64)
            found = influence(model, sources, probe, **options)
            assert torch.equal(found, influence(plain, sources, probe, **options))


def test_an_embedding_that_shrinks_its_rows(repeatable):
    model = nn.Sequential(nn.Embedding(6, 3, max_norm=0.1), nn.Flatten(), nn.Linear(6, 4)).double()
    before = model[0].weight.clone()
    for tokens in (torch.zeros(3, 2).long(), torch.arange(6).reshape(3, 2)):
        fisher_diagonal(model, [(tokens, torch.arange(3))] * 2)
        assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("small", [True, False])
def test_parameters_rewritten_later(small, monkeypatch):
    """Small models are copied for as long as it takes; of others it is told by name."""
    monkeypatch.setattr(preserve, "_KEPT", 1 << 24 if small else 0)

    def change(m, x):
        if x[0, 0] > 9:
            m.fc.weight.mul_(0.5)

    model, (x, y) = Model(change).double(), data()
    before = model.fc.weight.clone()
    told = pytest.raises(ModelError, match=r"rewrites its own parameter 'fc\.weight'")
    with nullcontext() if small else told:
        fisher_diagonal(model, [(x, y), (x + 20, y)])
    assert torch.equal(model.fc.weight, before) == small


def test_modules_that_are_not_registered(repeatable):
    teacher = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()

    def change(m, x):
        teacher(x.repeat(2, 1))

    model = Model(change, teachers=[teacher]).double()
    copied = copy.deepcopy(teacher.state_dict())
    fisher_diagonal(model, [data()])
    assert all(torch.equal(v, copied[k]) for k, v in teacher.state_dict().items())


def test_errors_of_the_model_are_not_hidden():
    model = Model(lambda m, x: (_ for _ in ()).throw(Failure("mine"))).double()
    with pytest.raises(Failure, match="mine"):
        fisher_diagonal(model, [data()])
    assert not issubclass(Failure, GradmaskError)
