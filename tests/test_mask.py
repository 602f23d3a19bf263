import copy
import math

import pytest
import torch
from torch import nn

from gradmask import FisherMask, fisher_diagonal, make_masks
from gradmask.errors import OptionError, StateError
from gradmask.seeding import seeded_generator


def network(seed=0):
    torch.manual_seed(seed)
    layers = (nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7, bias=False), nn.Tanh(), nn.Linear(7, 3))
    return nn.Sequential(*layers).double()


def batches(count=3, size=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 5, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def backward(model, batch):
    model.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_by_hand():
    # One logit z = w0 x0 + w1 x1 at w = 0: the gradient of a sample is (1/2 - y) x.
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    x, y = torch.tensor([[1.0, 3.0], [1.0, -3.0]]), torch.tensor([1.0, 1.0])
    # Per-sample gradients (-1/2, -3/2), (-1/2, 3/2): Fisher (1/4, 9/4), but the batch's gradient
    # is (-1/2, 0), so squaring that instead would keep the other weight.
    mask = FisherMask(model, keep=0.5, loss="bernoulli")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mask.attach(optimizer)
    mask.refresh([(x, y)])
    assert mask.masks["weight"].tolist() == [[False, True]]
    assert mask.kept_fraction == 0.5
    model.weight.grad = torch.tensor([[4.0, 6.0]])
    optimizer.step()
    assert model.weight.tolist() == [[0.0, pytest.approx(-0.6)]]


class PlainSGD:
    """SGD written out: momentum, Nesterov, weight decay, and the mask as equation 10 says."""

    def __init__(self, model, lr, momentum=0.0, nesterov=False, weight_decay=0.0):
        self.model, self.lr, self.momentum = model, lr, momentum
        self.nesterov, self.weight_decay = nesterov, weight_decay
        self.buffer = {}

    @torch.no_grad()
    def step(self, masks, scope):
        for name, p in self.model.named_parameters():
            keep = masks.get(name, torch.ones_like(p)).to(p.dtype)
            d = p.grad * keep + self.weight_decay * p
            if self.momentum:
                b = self.buffer.get(name)
                b = d.clone() if b is None else self.momentum * b + d
                self.buffer[name] = b
                d = d + self.momentum * b if self.nesterov else b
            change = -self.lr * d
            p += change * keep if scope == "update" else change


class PlainAdamW:
    """AdamW written out."""

    def __init__(self, model, lr, weight_decay, betas=(0.9, 0.999), eps=1e-8):
        self.model, self.lr, self.weight_decay = model, lr, weight_decay
        self.betas, self.eps = betas, eps
        self.m = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        self.v = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        self.t = 0

    @torch.no_grad()
    def step(self, masks, scope):
        self.t += 1
        for name, p in self.model.named_parameters():
            keep = masks.get(name, torch.ones_like(p)).to(p.dtype)
            g = p.grad * keep
            self.m[name] = self.betas[0] * self.m[name] + (1 - self.betas[0]) * g
            self.v[name] = self.betas[1] * self.v[name] + (1 - self.betas[1]) * g * g
            m = self.m[name] / (1 - self.betas[0] ** self.t)
            v = self.v[name] / (1 - self.betas[1] ** self.t)
            change = -self.lr * (m / (v.sqrt() + self.eps) + self.weight_decay * p)
            p += change * keep if scope == "update" else change


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, PlainSGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, PlainSGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (
        torch.optim.SGD,
        PlainSGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ),
    "adamw": (torch.optim.AdamW, PlainAdamW, {"lr": 0.01, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("implementation", [{"foreach": False}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("strategy", ["fisher", "random", "random_matched", "inverse"])
@pytest.mark.parametrize("scope", ["gradient", "update"])
@pytest.mark.parametrize("case", OPTIMIZERS)
def test_steps_are_those_of_a_plain_reimplementation(case, scope, strategy, implementation):
    build, plain, options = OPTIMIZERS[case]
    model, data = network(), batches()
    twin = copy.deepcopy(model)
    optimizer = build(model.parameters(), **options, **implementation)
    mask = FisherMask(model, keep=0.3, scope=scope, strategy=strategy, seed=5)
    mask.attach(optimizer)
    reference, masks = plain(twin, **options), {}
    for epoch in range(3):
        for batch in data:
            before = values(model)
            backward(model, batch)
            optimizer.step()
            backward(twin, batch)
            reference.step(masks, scope)
            for name, value in values(model).items():
                expected = dict(twin.named_parameters())[name]
                torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-12)
                if masks and (scope == "update" or case == "sgd"):
                    moved = value != before[name]
                    assert torch.equal(moved, moved & masks[name])
        mask.refresh(data)
        generator = seeded_generator(5, "mask", epoch)
        fisher = fisher_diagonal(twin, data)
        masks = make_masks(fisher, 0.3, strategy=strategy, generator=generator)
        assert mask.kept_fraction == pytest.approx(0.3, abs=0.01)


def test_momentum_and_decay_still_move_a_masked_weight():
    model = nn.Linear(2, 1, bias=False)
    mask = FisherMask(model, keep=0.5)
    mask.update({"weight": torch.tensor([[1.0, 0.5]])})
    for options in ({"momentum": 0.9}, {"weight_decay": 0.1}):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
        model.weight.grad = torch.ones(1, 2)
        optimizer.step()  # fills the momentum
        before = model.weight.detach().clone()
        mask.attach(optimizer)
        model.weight.grad = torch.ones(1, 2)
        optimizer.step()
        assert (model.weight != before).all()


@pytest.mark.parametrize("strategy", ["fisher", "random", "random_matched", "inverse"])
@pytest.mark.parametrize("scope", ["gradient", "update"])
def test_resuming_is_going_on(strategy, scope, tmp_path):
    options = {"keep": 0.3, "scope": scope, "strategy": strategy, "max_samples": 10, "seed": 2}
    data = batches()

    def build():
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, FisherMask(model, **options).attach(optimizer)

    def train(model, optimizer, mask):
        for batch in data:
            backward(model, batch)
            optimizer.step()
        mask.refresh(data)

    model, optimizer, mask = build()
    train(model, optimizer, mask)
    parts = (model, optimizer, mask)
    torch.save([part.state_dict() for part in parts], tmp_path / "state.pt")
    train(model, optimizer, mask)
    train(model, optimizer, mask)
    resumed = build()
    for part, state in zip(
        resumed, torch.load(tmp_path / "state.pt", weights_only=True), strict=True
    ):
        part.load_state_dict(state)
    train(*resumed)
    train(*resumed)
    assert equal(values(resumed[0]), values(model))
    assert equal(resumed[2].masks, mask.masks)


def test_state_before_the_first_refresh():
    model = network()
    fresh = FisherMask(network(1))
    fresh.load_state_dict(FisherMask(model).state_dict())
    assert (fresh.masks, fresh.refreshes) == ({}, 0)


def test_random_masks_are_drawn_afresh_and_need_no_data():
    def unread():
        raise AssertionError("the data were read")
        yield

    drawn = []
    for seed in (0, 1):
        mask = FisherMask(network(), strategy="random", seed=seed)
        for _ in range(2):
            mask.refresh(unread())
            drawn.append(torch.cat([m.flatten() for m in mask.masks.values()]))
    for i, ours in enumerate(drawn):
        for theirs in drawn[:i]:
            assert not torch.equal(ours, theirs)


def test_each_refresh_measures_other_samples(monkeypatch):
    seeds = []
    model, data = network(), batches()

    def spy(*args, seed, **options):
        seeds.append(seed)
        assert options["max_samples"] == 4
        return fisher_diagonal(*args, seed=seed, **options)

    monkeypatch.setattr("gradmask.scoring.fisher_diagonal", spy)
    for seed in (0, 1):
        mask = FisherMask(model, max_samples=4, seed=seed)
        for _ in range(3):
            mask.refresh(data)
    assert len(set(seeds)) == 6


def test_shares_as_realised():
    mask = FisherMask(network(), keep=0.5)
    assert mask.kept_fraction == 1.0
    assert mask.kept_fractions == dict.fromkeys(mask.kept_fractions, 1.0)
    mask.refresh(batches())
    total = sum(m.numel() for m in mask.masks.values())
    shares = [share * mask.masks[name].numel() for name, share in mask.kept_fractions.items()]
    assert sum(shares) / total == pytest.approx(mask.kept_fraction)
    assert mask.kept_fraction == pytest.approx(0.5, abs=1 / total)


def test_all_kinds_and_a_loss_of_the_users_own():
    model, data = network(), batches()
    for options in ({"kind": "sampled"}, {"kind": "exact"}, {"loss": nn.CrossEntropyLoss()}):
        mask = FisherMask(model, **options)
        mask.refresh(data)
        expected = fisher_diagonal(model, data, **({"kind": "empirical"} | options))
        if options.get("kind") != "sampled":
            assert equal(mask.masks, make_masks(expected, 0.25))


class Counting(torch.utils.data.Dataset):
    """More samples than a refresh reads."""

    def __init__(self, size):
        self.size, self.read = size, []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.read.append(index)
        return torch.full((2,), index / self.size), index % 2


@pytest.mark.parametrize(("options", "count"), [({}, 4000), ({"max_samples": None}, 4500)])
def test_a_refresh_reads_a_part_unless_told_otherwise(options, count):
    data = Counting(4500)
    mask = FisherMask(torch.nn.Linear(2, 2), 0.5, **options)
    mask.refresh(torch.utils.data.DataLoader(data, batch_size=500))
    assert len(set(data.read)) == len(data.read) == count


def test_lowest_and_each_tensor_by_itself():
    model, data = network(), batches()
    fisher = fisher_diagonal(model, data)
    mask = FisherMask(model, 0.5, which="lowest", per="tensor")
    mask.refresh(data)
    for name, values in fisher.items():
        found = mask.masks[name]
        assert found.sum() == math.ceil(values.numel() / 2)
        assert values[found].max() <= values[~found].min()
    state = mask.state_dict()
    again = FisherMask(model, 0.5, which="lowest", per="tensor")
    again.load_state_dict(state)
    assert again.sha256() == mask.sha256()
    for options in ({}, {"which": "lowest"}, {"per": "tensor"}):
        with pytest.raises(StateError, match=r"which|per"):
            FisherMask(model, 0.5, **options).load_state_dict(state)
    with pytest.raises(OptionError, match="which"):
        FisherMask(model, which="least")


def test_states_of_earlier_versions_have_the_highest_of_the_network():
    model = nn.Linear(3, 2)
    mask = FisherMask(model, 0.5)
    mask.refresh([(torch.randn(8, 3), torch.randint(2, (8,)))])
    state = mask.state_dict()
    assert "which" not in state
    FisherMask(model, 0.5).load_state_dict(state)
    with pytest.raises(StateError, match="which"):
        FisherMask(model, 0.5, which="lowest").load_state_dict(state)
