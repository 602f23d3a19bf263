"""Copies and pickles of mask, model and optimizer; what a mask keeps alive; replaced layers."""

import copy
import gc
import itertools
import pickle
import weakref

import pytest
import torch
from copies import COPIES
from small_models import FIRST, pair
from torch import nn
from torch.optim.lr_scheduler import StepLR
from wrapping_optimizers import Accelerated

from gradmask import FisherMask
from gradmask.errors import OptimizerError, StateError

SCOPES = ["gradient", "update"]


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.5, **options)


def step(model, optimizer):
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()


def masked_pair(**options):
    model = pair()
    optimizer = sgd(model, momentum=0.5)
    mask = FisherMask(model, keep=0.5, **options).attach(optimizer)
    mask.update(FIRST)
    step(model, optimizer)
    return {"model": model, "optimizer": optimizer, "mask": mask}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("order", itertools.permutations(["model", "optimizer", "mask"]))
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_are_masked_as_the_originals_are(duplicate, order, scope):
    parts = masked_pair(scope=scope)
    twins = dict(zip(order, duplicate(tuple(parts[name] for name in order)), strict=True))
    assert parts["model"].weight.tolist() == twins["model"].weight.tolist() == [[0.5, 2.0]]
    for one, other in ((parts, twins), (twins, parts)):
        before = other["model"].weight.tolist()
        step(one["model"], one["optimizer"])
        assert one["model"].weight.tolist() == [[-0.25, 2.0]]
        assert other["model"].weight.tolist() == before
    for one in (parts, twins):
        with pytest.raises(OptimizerError, match="attached already"):
            one["mask"].attach(one["optimizer"])
        one["mask"].update({"weight": torch.tensor([[1.0, 2.0]])})  # and no alarm
    step(parts["model"], parts["optimizer"])
    step(twins["model"], twins["optimizer"])
    assert torch.equal(parts["model"].weight, twins["model"].weight)
    assert parts["model"].weight[0, 1] == 1.5
    twins["mask"].detach()
    assert not twins["optimizer"]._optimizer_step_pre_hooks
    assert parts["optimizer"]._optimizer_step_pre_hooks


class Trainer:
    """Holds all, is held by the model, and gives its own method as the loss."""

    def __init__(self):
        self.model = pair()
        self.optimizer = Accelerated(sgd(self.model))
        self.mask = FisherMask(self.model, keep=0.5, loss=self.loss, scope="update")
        self.mask.attach(self.optimizer)
        self.mask.update(FIRST)
        self.model.trainer = self
        self.model.mask = self.mask

    def loss(self, outputs, targets):
        return (outputs - targets).square().sum()


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("root", [lambda t: t, lambda t: t.model, lambda t: [{"m": t.mask}, t]])
def test_copies_of_what_holds_them_in_circles(duplicate, root):
    trainer = Trainer()
    made = duplicate(root(trainer))
    twin = made[1] if isinstance(made, list) else getattr(made, "trainer", made)
    assert twin.mask is twin.model.mask
    assert twin.mask.loss.__self__ is twin
    for one, other in ((twin, trainer), (trainer, twin)):
        before = other.model.weight.tolist()
        step(one.model, one.optimizer)
        assert one.model.weight.tolist() == [[0.5, 2.0]]
        assert other.model.weight.tolist() == before
    twin.mask.refresh([(torch.ones(3, 2), torch.zeros(3, 1))])
    assert twin.mask.refreshes == 2


def test_a_copy_notices_what_the_original_would():
    parts = masked_pair(scope="update")
    twins = copy.deepcopy(parts)
    with torch.no_grad():
        twins["model"].weight.add_(1.0)
    with pytest.raises(OptimizerError, match="moved between the optimizer's steps"):
        twins["mask"].update(FIRST)
    parts["mask"].update(FIRST)


def test_a_copy_of_the_mask_alone_is_attached_to_nothing_of_ours():
    parts = masked_pair()
    twin = copy.deepcopy(parts["mask"])
    gc.collect()
    step(parts["model"], parts["optimizer"])
    assert twin.model.weight.tolist() == [[0.5, 2.0]]
    optimizer = sgd(twin.model)
    twin.attach(optimizer)
    step(twin.model, optimizer)
    assert twin.model.weight.tolist() == [[0.0, 2.0]]


def test_a_loss_that_cannot_be_pickled():
    parts = masked_pair(loss=lambda outputs, targets: outputs.sum())
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(parts)
    step(parts["model"], parts["optimizer"])
    assert parts["model"].weight.tolist() == [[-0.25, 2.0]]


# What a mask keeps alive


@pytest.mark.parametrize("scope", SCOPES)
def test_optimizers_that_are_let_go_are_freed(scope):
    model = pair()
    mask = FisherMask(model, keep=0.5, scope=scope)
    gone = []
    for _ in range(50):
        inner = sgd(model, momentum=0.9)
        optimizer = Accelerated(inner)
        mask.attach(optimizer)
        step(model, optimizer)
        mask.update(FIRST)
        gone += [weakref.ref(o) for o in (inner, optimizer)]
        gone.append(weakref.ref(inner.state[model.weight]["momentum_buffer"]))
    del inner, optimizer
    assert all(found() is None for found in gone)
    assert not mask._steps._handles


def test_optimizers_with_a_schedule_are_freed_by_the_collector():
    model = pair()
    mask = FisherMask(model, keep=0.5)
    gone = []
    for _ in range(5):
        optimizer = sgd(model)
        schedule = StepLR(optimizer, 1)
        mask.attach(optimizer)
        step(model, optimizer)
        schedule.step()
        gone.append(weakref.ref(optimizer))
    del optimizer, schedule
    gc.collect()
    assert all(found() is None for found in gone)


def test_a_mask_is_freed_with_its_model_and_optimizer():
    parts = masked_pair()
    gone = [weakref.ref(part) for part in parts.values()]
    parts.clear()
    gc.collect()
    assert all(found() is None for found in gone)


def test_a_mask_that_is_let_go_holds_on():
    parts = masked_pair()
    del parts["mask"]
    gc.collect()
    step(parts["model"], parts["optimizer"])
    assert parts["model"].weight.tolist() == [[-0.25, 2.0]]


def saved_weights(size):
    """Tensors of a size that nothing else has."""
    gc.collect()
    return sum(1 for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == (1, size))


class Breaking(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        raise ArithmeticError("broken")


@pytest.mark.parametrize("inside", [False, True])
def test_a_step_that_fails_leaves_no_saved_weights(inside):
    model = nn.Linear(12347, 1, bias=False)
    optimizer = (Breaking if inside else torch.optim.SGD)(model.parameters(), lr=0.5)
    mask = FisherMask(model, keep=0.5, scope="update").attach(optimizer)
    mask.update({"weight": torch.arange(12347.0)[None]})
    model.weight.grad = torch.ones_like(model.weight)
    held = saved_weights(12347)

    def closure():
        if not inside:
            raise ArithmeticError("broken")

    for _ in range(5):
        try:
            optimizer.step(closure)
        except ArithmeticError:
            pass
        else:
            raise AssertionError("it did not fail")
    assert saved_weights(12347) == held
    if not inside:
        before = model.weight.detach().clone()
        optimizer.step()
        assert torch.equal(model.weight != before, mask.masks["weight"])
        mask.update({"weight": torch.arange(12347.0)[None]})


# Beside other hooks and masks


@pytest.mark.parametrize("scopes", [("update", "update"), ("gradient", "update")])
def test_two_masks_on_one_optimizer(scopes):
    both = nn.ModuleList([pair(), pair()])
    optimizer = torch.optim.SGD(both.parameters(), lr=0.5, weight_decay=0.5)
    masks = [
        FisherMask(model, keep=0.5, scope=scope).attach(optimizer)
        for model, scope in zip(both, scopes, strict=True)
    ]
    masks[0].update(FIRST)
    masks[1].update({"weight": torch.tensor([[1.0, 2.0]])})

    def closure():
        for model in both:
            model.weight.grad = torch.ones(1, 2)

    optimizer.step(closure)
    assert both[0].weight.tolist() == [[0.25, 1.5 if scopes[0] == "gradient" else 2.0]]
    assert both[1].weight.tolist() == [[1.0, 1.0]]


def test_another_hook_that_replaces_the_arguments():
    parts = masked_pair(scope="update")
    hook = parts["optimizer"].register_step_pre_hook(lambda o, a, k: ((*a,), k))
    with pytest.raises(OptimizerError, match=r"register that hook before mask\.attach"):
        step(parts["model"], parts["optimizer"])
    parts["mask"].detach()
    parts["mask"].attach(parts["optimizer"])  # behind it now
    before = parts["model"].weight[0, 1].item()
    step(parts["model"], parts["optimizer"])
    assert parts["model"].weight[0, 1] == before
    hook.remove()


# Replaced layers


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shape", [(2, 2), (1, 3), (2,), (2, 1), (5000, 7000)])
def test_a_layer_of_another_shape_is_not_stepped_with_the_old_mask(scope, shape):
    model = pair()
    mask = FisherMask(model, keep=0.5, scope=scope).attach(sgd(model))
    mask.update(FIRST)
    model.weight = nn.Parameter(torch.ones(shape))
    optimizer = sgd(model)
    mask.attach(optimizer)
    model.weight.grad = torch.ones(shape)
    for act in (optimizer.step, mask.apply_):
        with pytest.raises(StateError, match=r"'weight' was made for the shape \(1, 2\).*refresh"):
            act()
    assert bool((model.weight == 1.0).all())
    mask.update({"weight": torch.arange(model.weight.numel()).view(shape).float()})  # the mend
    optimizer.step()
    assert torch.equal(model.weight != 1.0, mask.masks["weight"])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("way", ["a new optimizer", "a new group"])
def test_another_object_of_the_same_shape_has_the_mask_of_its_name(scope, way):
    model = pair()
    optimizer = sgd(model)
    mask = FisherMask(model, keep=0.5, scope=scope).attach(optimizer)
    mask.update(FIRST)
    model.weight = nn.Parameter(torch.tensor([[5.0, 6.0]]))
    if way == "a new optimizer":
        optimizer = sgd(model)
        mask.attach(optimizer)
    else:
        optimizer.add_param_group({"params": model.parameters(), "lr": 0.5})
    step(model, optimizer)
    assert model.weight.tolist() == [[4.5, 6.0]]
    model.weight.grad = torch.ones(1, 2)
    mask.apply_()
    assert model.weight.grad.tolist() == [[1.0, 0.0]]
    mask.update(FIRST)
