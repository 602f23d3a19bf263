"""Masks of training's own backward passes, in Lightning."""

import os
import random

import numpy as np
import pytest
import torch
from diagonals import USELESS, assert_near, hooks_of
from processes import run_processes
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from gradmask import fisher_diagonal
from gradmask.errors import GradmaskWarning, ModelError, OptionError

pytest.importorskip("lightning.pytorch")
pytest.importorskip("pytorch_lightning")
from lightning_runs import (
    PACKAGES,
    Noisy,
    assert_same,
    fitted,
    lightning,
    module_of,
    samples,
    shuffled,
    trainer_of,
)

from gradmask.integrations.lightning import FisherMaskCallback

pytestmark = pytest.mark.usefixtures("repeatable", "own_environment")


def online(keep=0.3, **options):
    return FisherMaskCallback(keep, **{"refresh": "online", **options})


def network(dropout=0.0):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


def module(step=None, net=None):
    """One whose `training_step` is another."""
    found = module_of(lightning, net or network())
    if step:
        found.training_step = step.__get__(found)
    return found


@pytest.mark.parametrize("model", [None, "net"])
@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2, "precision": "bf16-mixed", "gradient_clip_val": 0.1},
        {"precision": "64-true"},
        {"strategy": "ddp", "use_distributed_sampler": False},  # calls forward for training_step
    ],
)
def test_the_diagonal_is_that_of_each_samples_own_loss(diagonals, monkeypatch, model, options):
    """Whatever the mean is over; what is validated in between is not collected."""
    monkeypatch.setenv("MASTER_PORT", "0")
    trained, callback = module(), online(every=1, model=model)
    trained.configure_optimizers = lambda: torch.optim.SGD(trained.parameters(), lr=0.0)
    host = trainer_of(lightning, callback, max_epochs=3, val_check_interval=2, **options)
    try:
        host.fit(trained, shuffled(), DataLoader(samples(4), 2))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    dtype = next(trained.parameters()).dtype
    data = [(inputs.to(dtype), labels) for inputs, labels in DataLoader(samples(), 8)]
    expected = fisher_diagonal(trained.net, data)
    near = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    assert len(diagonals) == callback.mask.refreshes == 2
    for found in diagonals:
        assert_near(found, expected, 1e-2 if "bf16-mixed" in options.values() else near)
    assert not hooks_of(trained)


@pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES)
def test_steps_instead_of_epochs(package):
    callback = online(steps=3)
    fitted(package, callback, net=network(), max_epochs=2, accumulate_grad_batches=2)
    assert (callback.steps, callback.mask.refreshes) == (6, 2)


def test_another_loss_is_no_surprise():
    callback = online()
    trained = module(lambda self, batch, _: self(batch[0]).square().mean())
    with pytest.warns(GradmaskWarning, match="1/N"):
        trainer_of(lightning, callback, max_epochs=2).fit(trained, shuffled())
    assert callback.mask.refreshes == 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_mask_that_keeps_all_changes_nothing(accumulate):
    def run(callback=None):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        loader = DataLoader(Noisy(*samples().tensors), 8, shuffle=True)
        options = {"net": network(0.2), "accumulate_grad_batches": accumulate}
        return fitted(lightning, callback, loader=loader, **options)

    callback = online(1.0, every=2)
    assert_same(run(callback), run())
    assert callback.mask.refreshes == 3


class Stateful:
    """A loader that goes on within an epoch."""

    def __init__(self):
        self.batches, self.place = list(DataLoader(samples(), 8)), 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.place %= len(self)
        while self.place < len(self):
            self.place += 1
            yield self.batches[self.place - 1]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


@pytest.mark.parametrize("step", [5, 8])
def test_a_resumed_run_is_one_that_went_on(tmp_path, step):
    """Stopped at the end of an epoch of 5 steps, and within it."""
    runs = []
    for path in (None, tmp_path / f"step={step}.ckpt"):
        callback, trained = online(scope="update", every=2), module()
        options = {"save_top_k": -1, "filename": "{step}", "every_n_train_steps": 1}
        save = lightning.callbacks.ModelCheckpoint(tmp_path, **options)
        host = trainer_of(lightning, save, callback, enable_checkpointing=True)
        host.fit(trained, Stateful(), ckpt_path=path, weights_only=True)
        assert callback.steps == 20
        runs.append((callback.mask, trained.state_dict()))
    assert runs[0][0].refreshes == runs[1][0].refreshes == 3
    assert_same(runs[1][0].masks, runs[0][0].masks)
    assert_same(runs[1][1], runs[0][1])


@pytest.mark.parametrize(("options", "message"), USELESS)
def test_options_without_use_are_told_at_once(options, message):
    with pytest.raises(OptionError, match=message):
        online(**options)


def failing(self, batch, index):
    assert index < 3, "on purpose"
    return functional.cross_entropy(self(batch[0]), batch[1])


def around(self, batch, _):
    return functional.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("trained", "steps", "error", "message"),
    [
        (lambda: module_of(lightning), 0, ModelError, "statistics of the batch.*refresh='epoch'"),
        (lambda: module(around), 1, ModelError, "Nothing was collected of the first step.*model="),
        (lambda: module(failing), 3, AssertionError, "on purpose"),
    ],
    ids=["BatchNorm", "not called", "of training"],
)
def test_errors_come_early_and_leave_nothing(trained, steps, error, message):
    trained, host = trained(), trainer_of(lightning, online())
    with pytest.raises(error, match=message):
        host.fit(trained, shuffled())
    assert host.global_step == steps
    assert not hooks_of(trained)
    assert not any(o._optimizer_step_pre_hooks for o in host.optimizers)


def test_compiled_modules_are_refused():
    compiled = torch.compile(module())
    with pytest.raises(OptionError, match=r"leave torch\.compile out"):
        trainer_of(lightning, online(model="net")).fit(compiled, shuffled())


def test_a_mask_that_is_never_made():
    with pytest.warns(GradmaskWarning, match="use steps=<few>, or more epochs"):
        fitted(callback=online(), net=network(), max_epochs=1)


def fit_on_ranks(rank, world, folder):
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    names |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "TORCHELASTIC_RUN_ID": "one"}
    os.environ |= {name: str(value) for name, value in names.items()}
    runs = []
    for path in (None, folder / "epoch=2.ckpt"):
        callback, trained = online(every=2), module()
        options = {"save_top_k": -1, "filename": "{epoch}"}
        save = lightning.callbacks.ModelCheckpoint(folder, **options)
        options = {"enable_checkpointing": True, "devices": world, "strategy": "ddp"}
        host = trainer_of(lightning, save, callback, max_epochs=5, **options)
        host.fit(trained, DataLoader(samples(), 5), ckpt_path=path, weights_only=True)
        assert callback.mask.refreshes == 4
        runs.append((callback.mask.masks, trained.state_dict()))
    assert_same(runs[1][0], runs[0][0])
    assert_same(runs[1][1], runs[0][1])
    torch.save(runs[0][0], folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes(tmp_path):
    run_processes(fit_on_ranks, 2, tmp_path, tmp_path)
    assert_same(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)))
