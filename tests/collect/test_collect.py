"""What `mask.collect()` does to training, and when it counts."""

import pytest
import torch
import torch.nn.functional as F
from collecting import OPTIMIZERS, batches, close, equal, hooks, loss_of, network
from torch import nn

from gradmask import FisherMask, fisher_diagonal
from gradmask.errors import DataError, ModelError


@pytest.fixture(autouse=True)
def _repeatable(repeatable):
    """In all tests here."""


def each(model, data):
    """The diagonal of every batch."""
    return [fisher_diagonal(model, [batch]) for batch in data]


def train(optimizer, autocast, refresh, collects, clip):
    model = network(0.3, torch.float32 if autocast else torch.float64)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    mask = FisherMask(model, keep=0.5, refresh=refresh if collects else "pass", every=2)
    mask.attach(optimizer)
    states, found = [], []
    with mask.collect(every=3) if collects and refresh == "pass" else torch.enable_grad():
        for x, y in batches(8, dtype=torch.float32 if autocast else torch.float64):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                outputs = model(x)
            F.cross_entropy(outputs.to(x.dtype), y).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            states.append(torch.get_rng_state())
            found.append({n: p.detach().clone() for n, p in model.named_parameters()})
    mask.detach()
    assert hooks(model) == 0
    return states, found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("refresh", ["pass", "online"])
@pytest.mark.parametrize("clip", [False, True])
def test_training_is_the_same_to_the_bit(optimizer, autocast, refresh, clip):
    torch.manual_seed(4)
    plain = train(optimizer, autocast, refresh, False, clip)
    torch.manual_seed(4)
    ours = train(optimizer, autocast, refresh, True, clip)
    assert all(map(torch.equal, ours[0], plain[0]))
    assert all(map(equal, ours[1], plain[1]))


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_one_of_so_many_batches(every):
    model, data = network(), batches(5)
    mask = FisherMask(model)
    for batch in data:
        with mask.collect(every=every):
            loss_of(model, batch).backward()
    close(mask.collect(every=every).diagonal(), fisher_diagonal(model, data[::every]))


@pytest.mark.parametrize("average", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("count", [1, 4])
def test_an_exponential_average(average, count):
    model, data = network(), batches(count)
    mask = FisherMask(model)
    for batch in data:
        with mask.collect(average=average):
            loss_of(model, batch).backward()
    mean = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for diagonal in each(model, data):
        mean = {n: average * m + (1 - average) * diagonal[n] for n, m in mean.items()}
    expected = {name: m.detach() / (1 - average**count) for name, m in mean.items()}
    close(mask.collect(average=average).diagonal(), expected)
    assert mask.state_dict()["collected"]["weight"] == pytest.approx(1 - average**count)
    mask.refresh()
    close(mask.collect(average=average).diagonal(), expected)  # goes on


def test_weights_are_those_of_each_step():
    model, data = network(), batches(4)
    mask = FisherMask(model, keep=0.5, refresh="online", every=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    mask.attach(optimizer)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in data:
        diagonal = fisher_diagonal(model, [batch])
        total = {name: t + diagonal[name] / len(data) for name, t in total.items()}
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    other = FisherMask(model, keep=0.5)
    other.update({name: t.detach() for name, t in total.items()})
    mask.refresh()
    assert equal(mask.masks, other.masks)
    with pytest.raises(DataError, match="Nothing was collected"):
        mask.refresh()
    assert mask.refreshes == 1


def test_dropout_is_part_of_it():
    model, (batch,) = network(0.5), batches(1)
    torch.manual_seed(3)
    with FisherMask(model).collect() as collector:
        loss_of(model, batch).backward()
    torch.manual_seed(3)
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    squares = [torch.zeros_like(p) for p in model.parameters()]
    for loss in losses:
        for square, g in zip(
            squares, torch.autograd.grad(loss, model.parameters(), retain_graph=True), strict=True
        ):
            square += g.square() / len(losses)
    close(collector.diagonal(), dict(zip(dict(model.named_parameters()), squares, strict=True)))


def test_bfloat16():
    model, data = network(dtype=torch.float32), batches(dtype=torch.float32)
    with FisherMask(model).collect() as collector:
        for x, y in data:
            with torch.autocast("cpu", torch.bfloat16):
                outputs = model(x)
                loss = F.cross_entropy(outputs, y)
            (loss * 2.0**10).backward()
    truth = fisher_diagonal(model, data)
    for name, found in collector.diagonal().items():
        assert found.dtype == torch.float32
        assert (found - truth[name]).norm() < 0.05 * truth[name].norm(), name


@pytest.mark.parametrize("size", [4, 1])
@pytest.mark.parametrize("average", [None, 0.5])
def test_batches_that_overflow_in_float16_are_left_out(size, average):
    model, data = network(dtype=torch.float32), batches(3, size, torch.float32)
    found = []
    for scales in ((2.0**8, 2.0**30, 2.0**8), (2.0**8, 2.0**8)):
        with FisherMask(model).collect(average=average) as collector:
            for (x, y), scale in zip(data[:: 4 - len(scales)], scales, strict=True):
                with torch.autocast("cpu", torch.float16):
                    outputs = model(x)
                (F.cross_entropy(outputs.float(), y) * scale).backward()
        found.append(collector.diagonal())
    assert any(p.grad.isnan().any() or p.grad.isinf().any() for p in model.parameters())
    assert equal(*found)


def test_accumulated_gradients():
    model, data = network(), batches(4)
    with FisherMask(model).collect() as collector:
        for batch in data:
            (loss_of(model, batch) / 4).backward()
    close(collector.diagonal(), fisher_diagonal(model, data))


def test_two_backward_passes_are_refused():
    model, data = network(), batches(2)
    with FisherMask(model).collect() as collector:
        loss = loss_of(model, data[0])
        loss.backward(retain_graph=True)
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)  # trains nothing
        with pytest.raises(ModelError, match=r"second loss.backward\(\)"):
            loss.backward()
    close(collector.diagonal(), fisher_diagonal(model, data[:1]))


def test_other_gradients_do_not_count():
    model, data = network(), batches(2)
    collector = FisherMask(model).collect()
    with collector:
        x = data[0][0].clone().requires_grad_()
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
        torch.autograd.grad(model(x).sum(), list(model.parameters()))
    with pytest.raises(DataError, match="Nothing was collected"):
        collector.diagonal()
    with collector:
        loss_of(model, data[1]).backward()
    close(collector.diagonal(), fisher_diagonal(model, data[1:]))


def test_a_gradient_penalty_trains_as_without():
    found = []
    for collects in (False, True):
        model, (batch,) = network(), batches(1)
        collector = FisherMask(model).collect()
        with collector if collects else torch.enable_grad():
            x = batch[0].clone().requires_grad_()
            outputs = model(x)
            (g,) = torch.autograd.grad(outputs.square().sum(), x, create_graph=True)
            (F.cross_entropy(outputs, batch[1]) + g.square().sum()).backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    assert equal(*found)
    with pytest.raises(DataError, match="Nothing was collected"):
        collector.diagonal()


def test_passes_that_do_not_train():
    model, (other, *data) = network(), batches(3)
    with FisherMask(model).collect() as collector:
        for batch in data:
            model.eval()
            loss_of(model, other).backward()
            model.train()
            with torch.no_grad():
                model(batch[0])
            model(batch[0])  # without a backward pass
            loss_of(model, batch).backward()
            model(batch[0])
    close(collector.diagonal(), fisher_diagonal(model, data))
    assert hooks(model) == 0


def test_torch_func_goes_its_own_way():
    model, (batch, other) = network(), batches(2)
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def loss(weights, x, y):
        return F.cross_entropy(torch.func.functional_call(model, weights, (x[None],)), y[None])

    with FisherMask(model).collect() as collector:
        squares = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, *batch)
        loss_of(model, other).backward()
    close({n: g.square().mean(0) for n, g in squares.items()}, fisher_diagonal(model, [batch]))
    close(collector.diagonal(), fisher_diagonal(model, [other]))


def test_backward_outside_is_not_collected():
    model, (batch,) = network(), batches(1)
    with FisherMask(model).collect() as collector:
        loss = loss_of(model, batch)
    loss.backward()
    with pytest.raises(DataError, match=r"loss\.backward\(\)\) inside mask\.collect"):
        collector.diagonal()


def test_running_the_model_twice_is_refused():
    model, data = network(), batches(2)
    with FisherMask(model).collect() as collector:
        loss = loss_of(model, data[0]) + loss_of(model, data[1])
        with pytest.raises(ModelError, match="ran twice before"):
            loss.backward()
    with collector:
        loss_of(model, data[0]).backward()
    close(collector.diagonal(), fisher_diagonal(model, data[:1]))


def test_options_stay_until_others_are_given():
    mask = FisherMask(network(), refresh="online", every=3)
    assert mask.collect().every == 3
    assert mask.collect(average=0.5).average == 0.5
    assert mask.collect() is mask.collect()
    assert (mask.collect().every, mask.collect().average) == (1, 0.5)
