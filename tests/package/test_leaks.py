"""Memory does not grow over refreshes and optimizers; what is let go of is freed, after errors too.

The peak is the process's own, as Linux counts it, and set back before each part.
"""

import contextlib
import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import gradmask
from gradmask import FisherMask
from gradmask.errors import DataError

MIB = 1 << 20
SIZE = 512  # weights of 1 MiB, masks of a quarter
GROWTH = 6 * MIB
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def network():
    return nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU(), nn.Linear(SIZE, 4))


def batches(count=2):
    return [(torch.randn(4, SIZE), torch.arange(4)) for _ in range(count)]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def train_step(model, optimizer):
    inputs, labels = batches(1)[0]
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()


def peak(work, rounds):
    """The most memory that the process had while it worked, in bytes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(rounds):
        work()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def growth(work, rounds):
    """By how much the peak and the number of tensors grow from the first rounds to the others."""
    first = peak(work, rounds // 5)
    held = tensors()
    return peak(work, rounds) - first, tensors() - held


def rounds(short, long):
    """Both scopes in the long form, one in the short."""
    slow = [pytest.param(scope, long, marks=pytest.mark.slow) for scope in ("gradient", "update")]
    return pytest.mark.parametrize(("scope", "count"), [("update", short), *slow])


@linux
@pytest.mark.usefixtures("repeatable")
@rounds(40, 200)
def test_memory_over_refreshes(scope, count):
    model, loader = network(), batches()
    optimizer = sgd(model)
    mask = FisherMask(model, keep=0.25, scope=scope).attach(optimizer)

    def refresh():
        mask.refresh(loader)
        train_step(model, optimizer)

    grown, more = growth(refresh, count)
    print(f"{scope}: {count} refreshes, peak {grown / MIB:+.1f} MiB, {more} tensors more")
    assert grown < GROWTH
    assert more <= 0


@linux
@pytest.mark.usefixtures("repeatable")
@rounds(20, 50)
def test_memory_over_optimizers(scope, count):
    model, loader = network(), batches()
    mask = FisherMask(model, keep=0.25, scope=scope)

    def another():
        optimizer = sgd(model)
        mask.attach(optimizer)
        train_step(model, optimizer)
        mask.refresh(loader)

    grown, more = growth(another, count)
    print(f"{scope}: {count} optimizers, peak {grown / MIB:+.1f} MiB, {more} tensors more")
    assert grown < GROWTH
    assert more <= 0


def failing_data():
    yield batches(1)[0]
    raise OSError("the disk is gone")


def a_failed_refresh(model, optimizer, mask):
    mask.refresh(failing_data())


def a_loss_that_is_not_finite(model, optimizer, mask):
    mask.refresh([(torch.full((4, SIZE), torch.nan), torch.arange(4))])


def labels_that_do_not_fit(model, optimizer, mask):
    mask.refresh([(torch.randn(4, SIZE), torch.arange(40))])


def a_failed_closure(model, optimizer, mask):
    def closure():
        model(batches(1)[0][0]).sum().backward()
        raise ArithmeticError("broken")

    optimizer.step(closure)


def a_failed_influence(model, optimizer, mask):
    inputs, labels = batches(1)[0]
    gradmask.influence(model, (inputs, labels), inputs[:, :-1], step=0.1)


def no_failure(model, optimizer, mask):
    sources = batches(1)[0]
    for method in ("kl", "quadratic", "diagonal"):
        gradmask.influence(model, sources, sources[0], step=0.1, method=method)
    gradmask.gradient_norms(model, sources)
    gradmask.fisher_diagonal(model, [sources], kind="exact")
    raise InterruptedError("to be caught as the others are")


FAILURES = {
    a_failed_refresh: OSError,
    a_loss_that_is_not_finite: DataError,
    labels_that_do_not_fit: DataError,
    a_failed_closure: ArithmeticError,
    a_failed_influence: RuntimeError,
    no_failure: InterruptedError,
}


@pytest.mark.parametrize("scope", ["gradient", "update"])
@pytest.mark.parametrize("failure", FAILURES, ids=lambda f: f.__name__)
def test_all_is_freed(failure, scope):
    model = network()
    optimizer = sgd(model)
    mask = FisherMask(model, keep=0.25, scope=scope).attach(optimizer)
    mask.refresh(batches())
    train_step(model, optimizer)
    with contextlib.suppress(FAILURES[failure]):
        failure(model, optimizer, mask)
        raise AssertionError("it did not fail")
    train_step(model, optimizer)  # all goes on as if nothing had been
    gone = [weakref.ref(thing) for thing in (model, optimizer, mask, *model.parameters())]
    del model, optimizer, mask
    gc.collect()
    assert all(found() is None for found in gone)
