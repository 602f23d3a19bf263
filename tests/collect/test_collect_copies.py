"""Copies and saved states of masks that collect."""

import copy
import io
import pickle

import pytest
import torch
from collecting import OPTIMIZERS, batches, close, equal, hooks, loss_of, network
from copies import COPIES

from gradmask import FisherMask, fisher_diagonal
from gradmask.errors import StateError


def begin(online=True, keep=0.5, **options):
    options |= {"refresh": "online", "every": 2} if online else {}
    model = network(0.3)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    return model, optimizer, FisherMask(model, keep=keep, **options).attach(optimizer)


def steps(parts, data, average=None, online=True):
    model, optimizer, mask = parts
    if not online:
        collector = mask.collect(every=2, average=average)
    for batch in data:
        optimizer.zero_grad()
        with torch.enable_grad() if online else collector:
            loss_of(model, batch).backward()
        optimizer.step()


def states(parts):
    return [part.state_dict() for part in parts], torch.get_rng_state()


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)  # without pickle


def resumed(state, online):
    parts = begin(online)
    for part, part_state in zip(parts, state[0], strict=True):
        part.load_state_dict(part_state)
    torch.set_rng_state(state[1])
    return parts


def same_parts(ours, theirs):
    assert equal(dict(ours[0].named_parameters()), dict(theirs[0].named_parameters()))
    assert equal(ours[2].masks, theirs[2].masks)
    mine, other = (parts[2].state_dict()["collected"] for parts in (ours, theirs))
    assert equal(mine.pop("sums"), other.pop("sums"))
    assert mine == other


def finish(parts, state, data, average=None, online=True):
    torch.set_rng_state(state[1])
    steps(parts, data[:4], average, online)
    parts[2].refresh()
    steps(parts, data[4:], average, online)


@pytest.mark.parametrize("average", [None, 0.5])
@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("done", [0, 1, 2, 5])
def test_training_resumes_to_the_bit(online, average, done):
    data = batches(11)
    parts = begin(online)
    steps(parts, data[:done], average, online)
    state = saved(states(parts))
    other = resumed(state, online)
    for each in (parts, other):
        finish(each, state, data[done:], average, online)
    same_parts(other, parts)


def test_a_state_replaces_what_was_collected():
    parts, data = begin(), batches(3)
    state = saved(states(parts))
    steps(parts, data)
    before = parts[2].state_dict()
    collected = before["collected"]
    assert collected["seen"] == 3
    assert collected["weight"] == 8
    with pytest.raises(StateError, match="damaged, or of another model"):
        parts[2].load_state_dict(before | {"collected": collected | {"sums": {"0": torch.ones(1)}}})
    plain = FisherMask(parts[0], keep=0.5).state_dict()
    assert "collected" not in plain
    assert parts[2].state_dict()["collected"]["weight"] == 8
    for other in (state[0][2], plain):
        parts[2].load_state_dict(before)
        parts[2].load_state_dict(other)
        empty = parts[2].state_dict()["collected"]
        assert (empty["seen"], empty["weight"], empty["sums"]) == (0, 0.0, {})


def test_states_are_no_views():
    parts, data = begin(), batches(3)
    steps(parts, data)
    state = parts[2].state_dict()
    before = copy.deepcopy(state["collected"]["sums"])
    other = begin()
    other[2].load_state_dict(state)
    steps(other, data)
    steps(parts, data)
    assert equal(state["collected"]["sums"], before)


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_copies_collect_as_the_originals_do(duplicate, order):
    parts, data = begin(), batches(11)
    steps(parts, data[:3])
    state = states(parts)
    twins = duplicate(tuple(parts[i] for i in order))
    twins = tuple(twins[order.index(i)] for i in range(3))
    for each in (parts, twins):
        finish(each, state, data[3:])
    same_parts(twins, parts)
    twins[2].detach()
    steps(twins, data[:1])
    assert twins[2].state_dict()["collected"]["seen"] == parts[2].state_dict()["collected"]["seen"]


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_copies_of_the_model_alone_do_not_collect(duplicate, when):
    model, data = network(), batches(2)
    with FisherMask(model).collect() as collector:
        if when != "before":
            loss = loss_of(model, data[0])
        if when == "after":
            loss.backward()
        twin = duplicate(model)
        loss_of(twin, data[1]).backward()
        size = len(pickle.dumps(twin))
        if when == "before":
            loss = loss_of(model, data[0])
        if when != "after":
            loss.backward()
    close(collector.diagonal(), fisher_diagonal(model, data[:1]))
    assert hooks(model) == 0
    assert size < 6000 + sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_within_a_context_are_outside_of_it(duplicate):
    model, data = network(), batches(2)
    mask = FisherMask(model)
    with mask.collect() as collector:
        loss_of(model, data[0]).backward()
        twin, other = duplicate((model, mask))
        loss_of(twin, data[1]).backward()
    close(other.collect().diagonal(), collector.diagonal(), 0)
    with other.collect():
        loss_of(twin, data[1]).backward()
    close(other.collect().diagonal(), fisher_diagonal(model, data))
    close(collector.diagonal(), fisher_diagonal(model, data[:1]))


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("root", [0, 2])
def test_copies_in_circles(duplicate, root):
    parts, data = begin(), batches(2)
    parts[0].mask, parts[0].optimizer = parts[2], parts[1]
    steps(parts, data[:1])
    twin = duplicate(parts[root])
    model = twin if root == 0 else twin.model
    steps((model, model.optimizer, model.mask), data)
    assert model.mask.state_dict()["collected"]["seen"] == 3
    assert parts[2].state_dict()["collected"]["seen"] == 1
