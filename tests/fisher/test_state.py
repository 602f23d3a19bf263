"""A measuring pass changes nothing, also when it fails in the middle."""

import copy

import pytest
import torch
from cases import assert_close, batches, floats, oracle, readout
from states import Failure, build, state
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradmask import fisher_diagonal
from gradmask.errors import ModelError


def data(sizes=(3, 2)):
    return batches(floats(2, 4), sizes)


@pytest.mark.parametrize("kind", ["empirical", "sampled", "exact"])
@pytest.mark.parametrize("max_samples", [None, 2])
def test_nothing_changes(kind, max_samples):
    model, measured = build(), data()
    before = state(model)
    fisher_diagonal(model, measured, kind=kind, max_samples=max_samples)
    assert state(model) == before


def test_shuffled_loader_leaves_the_random_state():
    model, (x, y) = build(), data((6,))[0]
    loader = DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True)
    before = state(model)
    fisher_diagonal(model, loader)
    fisher_diagonal(model, loader, max_samples=3)
    assert state(model) == before


def test_result_does_not_depend_on_the_mode():
    model, measured = build(), data()
    found = fisher_diagonal(model, measured)
    assert_close(found, oracle(model, measured))
    assert_close(fisher_diagonal(model.eval(), measured), found, 0)


def test_inputs_and_their_gradients_do_not_change():
    model, measured = build(), data()
    measured[0][0].requires_grad_()
    before = copy.deepcopy(measured)
    fisher_diagonal(model, measured)
    assert measured[0][0].grad is None
    for (x, y), (a, b) in zip(measured, before, strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)


def test_failure_in_the_middle_of_the_model():
    model, measured = build(), data()
    model.fail_after = 2  # in the second batch, when hooks have seen the first layers
    before = state(model)
    with pytest.raises(Failure):
        fisher_diagonal(model, measured)
    assert state(model) == before


def test_failure_in_the_backward_pass():
    model, measured = build(), data()
    model.function = lambda m, x: readout(m.conv(x)) + x.mul_(2).sum((1, 2))[:, None]
    before = state(model)
    with pytest.raises(ModelError, match="in place"):
        fisher_diagonal(model, measured)
    assert state(model) == before


@pytest.mark.parametrize("max_samples", [None, 2])
def test_failure_in_the_loader(max_samples):
    def loader():
        yield data()[0]
        torch.rand(1)
        raise Failure

    model = build()
    before = state(model)
    with pytest.raises(Failure):
        fisher_diagonal(model, loader(), max_samples=max_samples)
    assert state(model) == before


def test_failure_in_the_loss():
    def loss(outputs, target):
        raise Failure

    model, measured = build(), data()
    before = state(model)
    with pytest.raises(Failure):
        fisher_diagonal(model, measured, loss=loss)
    assert state(model) == before


def test_refused_model_keeps_its_modes():
    model, measured = build(), data()
    model.plain = nn.BatchNorm1d(3, track_running_stats=False)
    before = state(model)
    with pytest.raises(ModelError, match="'plain'"):
        fisher_diagonal(model, measured)
    assert state(model) == before


def test_hooks_of_the_user_stay_and_still_run():
    model, measured = build(), data((3,))
    calls = []
    model.conv.register_forward_pre_hook(lambda m, a: calls.append("before"))
    model.conv.register_forward_hook(lambda m, a, o: calls.append("after"))
    model.head.register_forward_hook(lambda m, a, o: 2 * o)
    model.head.register_full_backward_hook(lambda m, a, b: (a[0] * 3,))
    model.conv.weight.register_hook(lambda g: calls.append("gradient"))
    before = state(model)
    found = fisher_diagonal(model, measured, verify=False)
    assert state(model) == before
    assert calls == ["before", "after"] * 2  # once for two samples, once for the batch
    assert_close(found, oracle(model, measured))
    calls.clear()
    model(measured[0][0]).sum().backward()
    assert calls == ["before", "after", "gradient"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_called_where_gradients_are_off(mode):
    model, measured = build(), data()
    expected = oracle(copy.deepcopy(model), measured)
    with mode():
        before = state(model)
        found = fisher_diagonal(model, measured)
        assert state(model) == before
    assert_close(found, expected)
    assert not any(f.is_inference() for f in found.values())


def test_training_goes_on_as_if_nothing_had_happened():
    """One step of training after a pass equals a step without it."""

    def step(measure):
        torch.manual_seed(5)
        model, (x, y) = build(), data((4,))[0]
        if measure:
            fisher_diagonal(model, [(x, y)])
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        return model.state_dict()

    plain, measured = step(False), step(True)
    assert all(torch.equal(plain[name], measured[name]) for name in plain)
