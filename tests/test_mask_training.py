"""The mask in training loops: optimizer state, groups, clipping, scaling, unusual steps, copies."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from small_models import FIRST, pair, two_layers
from torch import nn
from torch.optim.lr_scheduler import StepLR

from gradmask import FisherMask

SCOPES = ["gradient", "update"]


def step(optimizer, model, gradient=(1.0, 1.0)):
    model.weight.grad = torch.tensor([gradient])
    optimizer.step()


def first_only(model, optimizer, **options):
    mask = FisherMask(model, keep=0.5, **options).attach(optimizer)
    mask.update(FIRST)
    return mask


@pytest.mark.parametrize("scope", SCOPES)
def test_momentum_by_hand(scope):
    model = pair()
    options = {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.25}
    optimizer = torch.optim.SGD(model.parameters(), **options)
    first_only(model, optimizer, scope=scope)
    step(optimizer, model, (4.0, 4.0))
    # d = (4, 0) + 0.25 (1, 2): the buffer is (4.25, 0.5), the change half of it.
    held = 2.0 if scope == "update" else 1.75
    assert model.weight.tolist() == [[-1.125, held]]
    step(optimizer, model, (4.0, 4.0))
    # d = (4, 0) + 0.25 (-1.125, held): added to half of the buffer.
    buffer = [3.71875 + 2.125, 0.25 * held + 0.25]
    assert optimizer.state[model.weight]["momentum_buffer"].tolist() == [buffer]
    moved = held if scope == "update" else held - 0.5 * buffer[1]
    assert model.weight.tolist() == [[-1.125 - 0.5 * buffer[0], moved]]


@pytest.mark.parametrize("implementation", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_state_of_a_held_weight_goes_on_with_zero_gradient(implementation):
    model, plain = pair().double(), pair().double()
    optimizer = torch.optim.AdamW(model.parameters(), **implementation)
    reference = torch.optim.AdamW(plain.parameters(), **implementation)
    mask = FisherMask(model, keep=0.5, scope="update").attach(optimizer)
    for masked in (False, True, True):
        if masked:
            mask.update(FIRST)
        model.weight.grad = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
        plain.weight.grad = torch.tensor([[3.0, 0.0 if masked else 4.0]], dtype=torch.float64)
        before = model.weight.detach().clone()
        optimizer.step()
        reference.step()
        assert masked == (model.weight[0, 1] == before[0, 1]).item()
    ours, theirs = optimizer.state_dict(), reference.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys() == {0}
    assert ours["state"][0].keys() == theirs["state"][0].keys()
    assert all(
        torch.equal(value, theirs["state"][0][key]) for key, value in ours["state"][0].items()
    )


@pytest.mark.parametrize("scope", SCOPES)
def test_groups_with_options_of_their_own_and_a_schedule(scope):
    model = two_layers()
    groups = [
        {"params": model[0].parameters(), "lr": 0.4},
        {"params": model[1].parameters(), "lr": 0.2, "weight_decay": 0.5},
    ]
    optimizer = torch.optim.SGD(groups)
    schedule = StepLR(optimizer, 1, 0.5)
    mask = FisherMask(model, keep=0.5, scope=scope, strategy="random").attach(optimizer)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for epoch in range(3):
        mask.refresh([])
        for name, value in expected.items():
            lr, decay = (0.4, 0.0) if name.startswith("0") else (0.2, 0.5)
            keep = mask.masks[name]
            change = -lr * 0.5**epoch * (keep + decay * value)
            expected[name] = value + (change * keep if scope == "update" else change)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        schedule.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name])


@pytest.mark.parametrize("clip_first", [True, False])
def test_step_after_clipping(clip_first):
    model = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    mask = first_only(model, optimizer)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    if not clip_first:
        mask.apply_()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    # The masked entry counts in the norm 5, and so shrinks the step, unless it is masked first.
    assert norm == (5.0 if clip_first else 3.0)
    assert model.weight[0].tolist() == pytest.approx([0.4 if clip_first else 0.0, 2.0], abs=1e-5)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("scope", SCOPES)
def test_infinite_gradients_of_masked_weights_do_no_harm(scope, value):
    model = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    first_only(model, optimizer, scope=scope)
    step(optimizer, model, (1.0, value))
    assert model.weight.tolist() == [[0.5, 2.0]]
    assert optimizer.state[model.weight]["momentum_buffer"].tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_skipped_and_following_step_under_a_scaler(scope, fused):
    model = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=fused)
    mask = first_only(model, optimizer, scope=scope)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    # A skipped step halves the scale: the gradient of the second is 2 / 2.
    for gradient, expected in ((float("inf"), [[1.0, 2.0]]), (2.0, [[0.5, 2.0]])):
        scaler.scale(torch.zeros((), requires_grad=True)).backward()
        model.weight.grad = torch.full((1, 2), gradient)
        scaler.step(optimizer)
        scaler.update()
        assert model.weight.tolist() == expected
        assert mask.masks["weight"].tolist() == [[True, False]]


class Around(torch.optim.SGD):
    """Moves the weights itself as well, before and after the step of its parent."""

    def move(self):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(1.0)

    def step(self, closure=None):
        self.move()
        loss = super().step(closure)
        self.move()
        return loss


def test_steps_within_steps_hold_masked_weights():
    torch.optim.SGD(pair().parameters())  # from now on the step of the parent runs hooks too
    model = pair()
    optimizer = Around(model.parameters(), lr=0.5)
    first_only(model, optimizer, scope="update")
    for first in (2.5, 4.0):
        step(optimizer, model)
        assert model.weight.tolist() == [[first, 2.0]]


class Told(torch.optim.Optimizer):
    """A user's optimizer whose step takes the loss."""

    @torch.no_grad()
    def step(self, loss):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad)


def test_arguments_of_a_step_that_are_no_closures():
    model = pair()
    optimizer = Told(model.parameters(), {})
    first_only(model, optimizer)
    model.weight.grad = torch.ones(1, 2)
    optimizer.step(torch.tensor(3.0))
    assert model.weight.tolist() == [[0.0, 2.0]]


def test_copies_of_the_optimizer_are_free_and_complete():
    model = pair()
    optimizer = torch.optim.AdamW(model.parameters())
    first_only(model, optimizer, scope="update")
    step(optimizer, model)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not twin._optimizer_step_pre_hooks
        assert not twin._optimizer_step_post_hooks
        assert twin.state_dict().keys() == optimizer.state_dict().keys()
        assert twin.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


def test_options_as_numpy_numbers():
    ours = FisherMask(
        pair(), np.float64(0.5), strategy="random", seed=np.int64(3), max_samples=np.int64(4)
    )
    theirs = FisherMask(pair(), 0.5, strategy="random", seed=3, max_samples=4)
    file = io.BytesIO()
    for _ in range(8):
        ours.refresh([])
        theirs.refresh([])
        assert torch.equal(ours.masks["weight"], theirs.masks["weight"])
    torch.save(ours.state_dict(), file)
    file.seek(0)
    theirs.load_state_dict(torch.load(file, weights_only=True))
    assert theirs.refreshes == 8


def test_states_are_copies():
    model = pair()
    mask = first_only(model, torch.optim.SGD(model.parameters()))
    state = mask.state_dict()
    fresh = FisherMask(pair(), keep=0.5)
    fresh.load_state_dict(state)
    state["masks"]["weight"].fill_(True)
    for kept in (mask, fresh):
        assert kept.masks["weight"].tolist() == [[True, False]]
