"""The mask beside what users do with an optimizer: AMP, clipping, closures, groups, ties."""

import copy

import pytest
import torch
from masked import fill, half_masked, linear, same, sgd
from torch import nn
from torch.optim.lr_scheduler import StepLR
from wrapping_optimizers import Accelerated

from gradmask import FisherMask
from gradmask.errors import (
    OptimizerError,
)


def moved(model, before):
    return {n: p.detach() != before[n] for n, p in model.named_parameters()}


def snapshot(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("scope", ["gradient", "update"])
def test_a_group_added_later_is_masked(scope):
    model = nn.Sequential(linear(), linear(3, 2))
    optimizer = sgd(model[0])
    mask = half_masked(model, optimizer, scope=scope)
    optimizer.add_param_group({"params": model[1].parameters(), "lr": 0.5})
    before = snapshot(model)
    fill(model)
    optimizer.step()
    assert same(moved(model, before), mask.masks)


def test_parameters_of_another_model_are_left_alone():
    model, other = linear(), linear(5, 2)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    mask = half_masked(model, optimizer)
    before, others = snapshot(model), snapshot(other)
    fill(model)
    fill(other)
    optimizer.step()
    assert same(moved(model, before), mask.masks)
    assert all(m.all() for m in moved(other, others).values())


def test_two_optimizers_share_a_mask():
    model = nn.Sequential(linear(), linear(3, 2))
    first, second = sgd(model[0]), torch.optim.AdamW(model[1].parameters(), weight_decay=0.0)
    mask = half_masked(model, first, scope="update").attach(second)
    before = snapshot(model)
    fill(model)
    first.step()
    second.step()
    assert same(moved(model, before), mask.masks)


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("scope", ["gradient", "update"])
def test_closures_are_masked(scope, keyword):
    model = linear()
    optimizer = sgd(model, weight_decay=0.0)
    mask = half_masked(model, optimizer, scope=scope)
    before = snapshot(model)

    def closure():
        fill(model)
        return torch.tensor(3.0)

    value = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert value == 3.0
    assert same(moved(model, before), mask.masks)


def test_a_step_that_the_scaler_skips():
    model = linear()
    optimizer = sgd(model)
    mask = half_masked(model, optimizer, scope="update")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = snapshot(model)

    def step(gradient):
        scaler.scale(torch.zeros((), requires_grad=True)).backward()
        fill(model, gradient)
        scaler.step(optimizer)
        scaler.update()

    step(float("inf"))
    assert same(snapshot(model), before)
    step(4.0)  # scaled by less now; what matters is which weights move
    assert same(moved(model, before), mask.masks)


def test_clipping_before_and_after_masking():
    model = nn.Linear(4, 1, bias=False)
    mask = half_masked(model, sgd(model))
    fill(model)
    assert nn.utils.clip_grad_norm_(model.parameters(), 100.0) == 2.0  # masked entries count
    mask.apply_()
    assert nn.utils.clip_grad_norm_(model.parameters(), 100.0).item() == pytest.approx(2**0.5)
    once = model.weight.grad.clone()
    mask.apply_()
    assert torch.equal(model.weight.grad, once)
    assert model.weight.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_accumulated_gradients_are_masked_once():
    model = linear()
    optimizer = sgd(model)
    mask = half_masked(model, optimizer)
    x = torch.randn(6, 4)
    for part in x.split(2):
        model(part).square().sum().backward()
    plain = copy.deepcopy(model)
    plain.zero_grad()
    plain(x).square().sum().backward()
    before = snapshot(model)
    optimizer.step()
    for name, p in plain.named_parameters():
        expected = before[name] - 0.1 * p.grad * mask.masks[name]
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), expected)


def test_schedulers_and_optimizer_state_stay_native():
    model = linear()
    optimizer = sgd(model, momentum=0.9)
    half_masked(model, optimizer, scope="update")
    schedule = StepLR(optimizer, 1, 0.5)
    fill(model)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    plain_model = linear()
    plain = sgd(plain_model, momentum=0.9)
    fill(plain_model)
    plain.step()
    assert optimizer.state_dict()["state"].keys() == plain.state_dict()["state"].keys()
    assert model.state_dict().keys() == plain_model.state_dict().keys()


def test_detaching_frees_the_optimizer():
    model = linear()
    optimizer = sgd(model)
    mask = half_masked(model, optimizer, scope="update")
    with pytest.raises(OptimizerError, match="already"):
        mask.attach(optimizer)
    mask.detach()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    before = snapshot(model)
    fill(model)
    optimizer.step()
    assert all(m.all() for m in moved(model, before).values())
    mask.attach(optimizer)


def test_before_the_first_refresh_nothing_is_masked():
    model = linear()
    optimizer = sgd(model)
    mask = FisherMask(model, scope="update").attach(optimizer)
    before = snapshot(model)
    fill(model)
    mask.apply_()
    optimizer.step()
    assert all(m.all() for m in moved(model, before).values())


def test_gradients_that_are_missing():
    model = linear()
    optimizer = sgd(model)
    half_masked(model, optimizer, scope="update")
    before = snapshot(model)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert torch.equal(model.bias.detach(), before["bias"])
    assert not torch.equal(model.weight.detach(), before["weight"])


def test_frozen_and_thawed_between_refreshes():
    model = nn.Sequential(linear(), linear(3, 2))
    data = [(torch.randn(8, 4), torch.randint(0, 2, (8,)))]
    model[0].requires_grad_(False)
    optimizer = sgd(model)
    mask = FisherMask(model, keep=0.5).attach(optimizer)
    mask.refresh(data)
    assert mask.masks.keys() == {"1.weight", "1.bias"}
    model[0].requires_grad_(True)
    mask.refresh(data)
    assert mask.masks.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    before = snapshot(model)
    fill(model)
    optimizer.step()
    assert same(moved(model, before), mask.masks)


def test_tied_weights_have_one_mask():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(6, 4)
            self.decoder = nn.Linear(4, 6, bias=False)
            self.decoder.weight = self.embedding.weight

        def forward(self, x):
            return self.decoder(self.embedding(x).mean(1))

    model = Tied()
    optimizer = sgd(model)
    mask = FisherMask(model, keep=0.5).attach(optimizer)
    mask.refresh([(torch.randint(0, 6, (9, 3)), torch.randint(0, 6, (9,)))])
    assert mask.masks.keys() == {"embedding.weight"}
    before = snapshot(model)
    fill(model)
    optimizer.step()
    assert same(moved(model, before), mask.masks)


def test_model_turned_to_double_after_construction():
    model = linear()
    optimizer = sgd(model)
    mask = half_masked(model, optimizer)
    model.double()
    before = snapshot(model)
    fill(model)
    optimizer.step()
    assert model.weight.dtype == torch.float64
    assert same(moved(model, before), mask.masks)


def test_compiled_models():
    model = torch.compile(nn.Sequential(linear(), nn.ReLU(), linear(3, 2)), backend="eager")
    optimizer = sgd(model)
    mask = FisherMask(model, keep=0.5).attach(optimizer)
    mask.refresh([(torch.randn(8, 4), torch.randint(0, 2, (8,)))])
    plain = model._orig_mod  # whose names these are
    before = snapshot(plain)
    fill(model)
    optimizer.step()
    assert same(moved(plain, before), mask.masks)
    state = mask.state_dict()
    other = FisherMask(plain, keep=0.5)
    other.load_state_dict(state)
    assert same(other.masks, mask.masks)
    state["masks"] = {f"_orig_mod.{name}": m for name, m in state["masks"].items()}  # as before
    other.load_state_dict(state)
    assert same(other.masks, mask.masks)
    assert FisherMask.from_masks(model, state["masks"]).masks.keys() == mask.masks.keys()


class Zeroing(torch.optim.SGD):
    """Uses the gradients that it finds, as SAM does, and sets them to zero."""

    def step(self, closure):
        self.zero_grad(set_to_none=False)
        return super().step(closure)


@pytest.mark.parametrize("wrap", [lambda o: o, Accelerated], ids=["plain", "wrapped"])
@pytest.mark.parametrize(("kind", "total"), [(torch.optim.SGD, 3.0), (Zeroing, 1.0)])
def test_a_closure_adds_to_whole_gradients_and_clips_them(wrap, kind, total):
    model = linear()
    optimizer = wrap(kind(model.parameters(), lr=0.1))
    half_masked(model, optimizer)
    fill(model, 2.0)
    norms = []

    def closure():
        for p in model.parameters():
            p.grad.add_(1.0)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1e9)))

    optimizer.step(closure)
    count = sum(p.numel() for p in model.parameters())
    assert norms == [pytest.approx(total * count**0.5)]


class Ignoring(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad)


def test_a_step_that_ignores_its_closure_is_masked():
    model = linear()
    optimizer = Ignoring(model.parameters(), {})
    mask = half_masked(model, optimizer)
    before = snapshot(model)
    fill(model)
    optimizer.step(lambda: None)
    assert same(moved(model, before), mask.masks)
