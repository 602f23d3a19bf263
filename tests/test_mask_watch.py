"""Weights that move where no masked step runs are noticed at the next refresh; others are not."""

import copy

import pytest
import torch
from small_models import FIRST, pair, two_layers
from torch import nn
from wrapping_optimizers import Alone, BareLookahead, Sam, ScheduleFree

from gradmask import FisherMask
from gradmask.errors import GradmaskWarning, OptimizerError

SCOPES = ["gradient", "update"]
MEND = r"mask\.detach\(\) and then mask\.attach\(optimizer\) afterwards"


def sgd(model, lr=0.5, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def masked_pair(scope, build=sgd, **options):
    model = pair()
    optimizer = build(model, **options)
    mask = FisherMask(model, keep=0.5, scope=scope).attach(optimizer)
    mask.update(FIRST)
    return model, optimizer, mask


def step(model, optimizer):
    model.weight.grad = torch.ones(1, 2)
    optimizer.step()


def put(model, *values):
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values]))


def refused(mask, message):
    """The refresh and the update raise before anything is measured, and the mask stays."""

    def unread():
        raise AssertionError("the data were read")
        yield

    before, masks = mask.state_dict(), dict(mask.masks)
    for renew in (lambda: mask.update(FIRST), lambda: mask.refresh(unread())):
        with pytest.raises(OptimizerError, match=message) as raised:
            renew()
        assert raised.match("'weight'")
        assert raised.match(MEND)
    assert mask.refreshes == before["refreshes"]
    assert all(mask.masks[name] is masks[name] for name in masks)


# What must be noticed


@pytest.mark.parametrize("scope", SCOPES)
def test_an_optimizer_that_moves_weights_in_another_method(scope):
    model, optimizer, mask = masked_pair(scope, lambda m: Alone(m.parameters()))
    model.weight.grad = torch.ones(1, 2)
    optimizer.advance()
    refused(mask, r"no step\(\) of Alone ran")


@pytest.mark.parametrize("scope", SCOPES)
def test_an_optimizer_that_is_not_attached_beside_one_that_is(scope):
    model, optimizer, mask = masked_pair(scope)
    step(model, sgd(model))
    refused(mask, r"no step\(\) of SGD ran")
    step(model, optimizer)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_parameter_that_no_attached_optimizer_holds(scope):
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    values = {"0.weight": FIRST["weight"], "1.weight": torch.ones(1, 1)}
    mine, other = sgd(model[0]), sgd(model[1])
    mask = FisherMask(model, keep=0.5, scope=scope).attach(mine)
    with pytest.warns(GradmaskWarning, match=r"No attached optimizer holds 1\.weight"):
        mask.update(values)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    mine.step()
    mask.update(values)
    mine.step()
    other.step()
    with pytest.raises(OptimizerError, match=r"'1\.weight' changed, and no optimizer that the mas"):
        mask.update(values)
    mask.attach(other)  # the mend
    mask.update(values)
    other.step()
    mask.update(values)


@pytest.mark.parametrize("scope", SCOPES)
def test_attaching_a_second_optimizer_forgets_nothing_of_the_first(scope):
    model, optimizer, mask = masked_pair(scope)
    put(model, 5.0, 6.0)
    second = sgd(model)
    mask.attach(second)
    refused(mask, r"no step\(\) of SGD ran")
    step(model, optimizer)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shape", [(1, 2), (1, 3)])
def test_a_replaced_parameter(scope, shape):
    model, optimizer, mask = masked_pair(scope)
    step(model, optimizer)
    model.weight = nn.Parameter(torch.full(shape, 7.0))
    new = sgd(model)
    model.weight.grad = torch.ones(shape)
    new.step()
    values = {"weight": torch.arange(shape[1]).view(shape).float()}
    with pytest.raises(OptimizerError, match="'weight' changed, and no optimizer that the mask is"):
        mask.update(values)
    mask.attach(new)
    mask.update(values)
    new.step()
    mask.update(values)


def test_averaging_between_steps_breaks_update():
    model, optimizer, mask = masked_pair("update")
    step(model, optimizer)
    put(model, 0.25, 2.0)  # the weight that learns may be moved
    mask.update(FIRST)
    step(model, optimizer)
    put(model, 0.25, 2.5)
    refused(mask, "moved between the optimizer's steps")


def test_lookahead_around_an_attached_optimizer_breaks_update():
    model = pair()
    inner = sgd(model)
    optimizer = BareLookahead(inner)
    mask = FisherMask(model, keep=0.5, scope="update").attach(inner)
    mask.update(FIRST)
    step(model, optimizer)
    refused(mask, "moved between the optimizer's steps")


def test_sam_that_subtracts_its_perturbation_breaks_update_by_rounding():
    torch.manual_seed(0)
    model = nn.Linear(50, 1, bias=False)
    optimizer = Sam(model.parameters(), exact=False, lr=0.1)
    mask = FisherMask(model, keep=0.5, scope="update").attach(optimizer)
    values = {"weight": torch.rand(1, 50)}
    mask.update(values)
    for _ in range(5):
        model.weight.grad = torch.randn(1, 50)
        optimizer.first_step()
        optimizer.second_step()
    with pytest.raises(OptimizerError, match="moved between"):
        mask.update(values)


def test_the_smallest_change_of_one_weight_among_many_is_noticed():
    torch.manual_seed(0)
    model = nn.Linear(1000, 700, bias=False)
    optimizer = sgd(model)
    mask = FisherMask(model, keep=0.5, scope="update").attach(optimizer)
    values = {"weight": torch.rand(700, 1000)}
    mask.update(values)
    model.weight.grad = torch.zeros(700, 1000)
    optimizer.step()
    free, held = (m.nonzero()[-1].tolist() for m in (mask.masks["weight"], ~mask.masks["weight"]))
    with torch.no_grad():
        model.weight[tuple(free)] += 1.0
        mask.update(values)
        optimizer.step()
        model.weight[tuple(held)] = torch.nextafter(model.weight[tuple(held)], torch.tensor(9.0))
    with pytest.raises(OptimizerError, match="'weight' moved between"):
        mask.update(values)


# What must not


@pytest.mark.parametrize("scope", SCOPES)
def test_momentum_and_decay_are_no_alarm(scope):
    model, optimizer, mask = masked_pair(scope, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        step(model, optimizer)
        step(model, optimizer)
        mask.update(FIRST)


def renewed(mask):
    mask.update(FIRST)


def loaded(mask):
    mask.load_state_dict(mask.state_dict())


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("begin", [renewed, loaded])
def test_weights_loaded_before_the_first_step(scope, begin):
    model, optimizer, mask = masked_pair(scope)
    for value in (5.0, 6.0):
        begin(mask)
        model.load_state_dict({"weight": torch.tensor([[value, value]])})
        step(model, optimizer)
        mask.update(FIRST)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_refresh_right_after_all_states_were_loaded(scope):
    model, optimizer, mask = masked_pair(scope)
    step(model, optimizer)
    states = copy.deepcopy([part.state_dict() for part in (mask, model, optimizer)])
    model, optimizer, mask = masked_pair(scope)
    put(model, 8.0, 9.0)
    for part, state in zip((mask, model, optimizer), states, strict=True):
        part.load_state_dict(state)
    mask.update(FIRST)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("steps", [0, 1])
def test_the_mend_for_weights_loaded_on_purpose(scope, steps):
    model, optimizer, mask = masked_pair(scope)
    for _ in range(steps):
        step(model, optimizer)
    put(model, 5.0, 6.0)
    if scope == "update" or not steps:
        refused(mask, "changed|moved")
    mask.detach()
    mask.attach(optimizer)
    mask.update(FIRST)
    step(model, optimizer)
    mask.update(FIRST)


@pytest.mark.parametrize("scope", SCOPES)
def test_without_an_attached_optimizer_nothing_is_checked(scope):
    model = pair()
    mask = FisherMask(model, keep=0.5, scope=scope)
    mask.update(FIRST)
    put(model, 1.0, 1.0)
    with pytest.warns(GradmaskWarning, match="masks nothing"):
        mask.update(FIRST)
    put(model, 2.0, 2.0)
    optimizer = sgd(model)
    mask.attach(optimizer)
    mask.update(FIRST)
    step(model, optimizer)
    mask.detach()
    put(model, 7.0, 7.0)
    mask.update(FIRST)
    put(model, 8.0, 8.0)
    mask.attach(optimizer)
    mask.update(FIRST)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_new_optimizer_each_round(scope):
    model = pair()
    mask = FisherMask(model, keep=0.5, scope=scope)

    def train(value):
        optimizer = sgd(model, momentum=0.5)
        mask.attach(optimizer)
        put(model, value, value)  # of an average over clients, say
        step(model, optimizer)
        step(model, optimizer)

    for value in (1.0, 2.0, 3.0):
        train(value)
        mask.update(FIRST)  # where none is alive


@pytest.mark.parametrize("scope", SCOPES)
def test_frozen_parameters_and_skipped_steps(scope):
    model = two_layers()
    optimizer = sgd(model)
    mask = FisherMask(model, keep=0.5, scope=scope).attach(optimizer)
    data = [(torch.randn(9, 4), torch.randint(0, 2, (9,)))]
    mask.refresh(data)
    mask.refresh(data)
    model[0].requires_grad_(False)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0][0]), data[0][1]).backward()
        optimizer.step()
        mask.refresh(data)
    model[0].requires_grad_(True)
    with torch.no_grad():
        model[0].weight.add_(1.0)  # it has no mask now
    mask.refresh(data)


@pytest.mark.parametrize("scope", SCOPES)
def test_conversions_and_layouts_are_no_alarm(scope):
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 2)
    optimizer = sgd(model)
    mask = FisherMask(model, keep=0.5, scope=scope).attach(optimizer)
    values = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    mask.update(values)
    for change in (
        lambda: model.to(memory_format=torch.channels_last),
        lambda: model.double(),
        lambda: model.to(memory_format=torch.contiguous_format),
    ):
        for steps in (0, 1):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            for _ in range(steps):
                optimizer.step()
            change()
            mask.update(values)


@pytest.mark.parametrize("scope", SCOPES)
def test_weights_swapped_for_an_evaluation_and_back(scope):
    model, optimizer, mask = masked_pair(scope)
    for steps in (0, 2):
        for _ in range(steps):
            step(model, optimizer)
        kept = copy.deepcopy(model.state_dict())
        put(model, 9.0, 9.0)
        model.load_state_dict(kept)
        mask.update(FIRST)


def test_schedule_free_may_rewrite_weights_that_only_have_masked_gradients():
    model, optimizer, mask = masked_pair("gradient", lambda m: ScheduleFree(m.parameters(), 0.5))
    for _ in range(2):
        optimizer.train()
        step(model, optimizer)
        optimizer.eval()
        mask.update(FIRST)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_parameter_replaced_between_steps_and_stepped(scope):
    model, optimizer, mask = masked_pair(scope)
    step(model, optimizer)
    model.weight = nn.Parameter(torch.tensor([[5.0, 2.0]]))
    optimizer.add_param_group({"params": model.parameters(), "lr": 0.5})
    step(model, optimizer)
    assert model.weight.tolist() == [[4.5, 2.0]]
    mask.update(FIRST)


def test_another_mask_set_by_hand_is_no_alarm():
    model, optimizer, mask = masked_pair("update")
    step(model, optimizer)
    mask.masks = {"weight": torch.tensor([[False, True]])}
    step(model, optimizer)
    assert model.weight.tolist() == [[0.5, 1.5]]
    mask.update(FIRST)


def test_minus_zero_is_zero():
    model, optimizer, mask = masked_pair("update")
    put(model, 1.0, 0.0)
    step(model, optimizer)
    put(model, 1.0, -0.0)
    mask.update(FIRST)
    step(model, optimizer)
    put(model, 1.0, 0.0)
    mask.update(FIRST)
