"""Masks of training's own backward passes, in the Trainer."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diagonals import USELESS, assert_near, hooks_of
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from trainer_runs import (
    Noisy,
    Ordered,
    Stream,
    assert_same,
    collate,
    long,
    made,
    samples,
    trainer,
    weights,
)
from transformers import TrainerCallback

from gradmask import fisher_diagonal
from gradmask.errors import GradmaskWarning, ModelError, OptionError
from gradmask.integrations.transformers import FisherMaskCallback

pytestmark = pytest.mark.usefixtures("repeatable")
STILL = {
    "text": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "class": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def online(keep=0.3, **options):
    return FisherMaskCallback(keep, **{"refresh": "online", **options})


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("text", {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}),
        ("text", {"bf16": True}),
        ("class", {}),
        ("class", {"bf16": True, "gradient_accumulation_steps": 3}),
    ],
)
def test_the_diagonal_is_that_of_each_samples_own_loss(tmp_path, diagonals, kind, options):
    """Whatever the mean is over; what is evaluated in between is not collected."""
    model, data = made(kind, **STILL[kind]), samples(kind=kind)
    host = trainer(
        tmp_path, online(every=1), kind=kind, model=model, data=data, num_train_epochs=3,
        learning_rate=0.0, eval_data=samples(24, kind)[20:], eval_strategy="steps", eval_steps=2,
        **options,
    )  # fmt: skip
    host.train()
    expected = fisher_diagonal(model.eval(), DataLoader(data, batch_size=4, collate_fn=collate))
    assert len(diagonals) == 2
    for found in diagonals:
        assert_near(found, expected, 1e-2 if options.get("bf16") else 1e-5)
    assert not hooks_of(model)
    assert not host.optimizer.optimizer._optimizer_step_pre_hooks


def test_steps_instead_of_epochs(tmp_path, diagonals):
    """A mask has its first batch even if it has fewer than `every`."""
    model, callback = made(**STILL["text"]), online(steps=3)
    host = trainer(tmp_path, callback, model=model, learning_rate=0.0, max_steps=10)
    host.__class__ = Ordered
    host.train()
    assert callback.mask.refreshes == 3
    batches = [collate(samples()[4 * n : 4 * n + 4]) for n in (0, 3, 1)]
    for found, batch in zip(diagonals, batches, strict=True):
        assert_near(found, fisher_diagonal(model.eval(), [batch]), 1e-5)


def test_streams_are_measured_as_they_are_trained(tmp_path):
    callback = online(every=2)
    trainer(tmp_path, callback, data=Stream(), max_steps=12).train()
    assert callback.mask.refreshes == 2


def test_another_loss_is_no_surprise(tmp_path):
    callback = online(steps=1)
    trainer(tmp_path, callback, max_steps=2, label_smoothing_factor=0.1).train()
    assert callback.mask.refreshes == 1


@pytest.mark.parametrize("options", [{"every": 2}, {"steps": 3, "every": 1}])
def test_a_mask_that_keeps_all_changes_nothing(tmp_path, options):
    runs = []
    for callback in (None, online(1.0, **options)):
        host = trainer(tmp_path, callback, collator=Noisy(), max_steps=11)
        host.train()
        logs = [log["loss"] for log in host.state.log_history if "loss" in log]
        runs.append((weights(host), logs, torch.rand(3).tolist(), random.random()))
    assert callback.mask.refreshes
    assert_same(runs[1][0], runs[0][0])
    assert runs[1][1:] == runs[0][1:]


@pytest.mark.parametrize(
    ("stop", "options"),
    [(5, {"every": 2}), (7, {"every": 2}), *long([(8, {"every": 3, "steps": 4}), (3, {})])],
)
def test_a_resumed_run_is_one_that_went_on(tmp_path, stop, options):
    """Stopped at the end of an epoch of 5 steps, and within it."""
    runs = []
    for path in (None, str(tmp_path / f"checkpoint-{stop}")):
        callback = online(scope="update", **options)
        host = trainer(tmp_path, callback, save_strategy="steps", save_steps=stop, max_steps=13)
        host.train(resume_from_checkpoint=path)
        runs.append((callback.mask, weights(host)))
    (mask, end), (mask_again, end_again) = runs
    assert mask.refreshes == mask_again.refreshes > 1
    assert_same(mask_again.masks, mask.masks)
    assert_same(end_again, end)
    state = json.loads((tmp_path / f"checkpoint-{stop}" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["FisherMaskCallback"]["args"]
    assert saved["every"] == options.get("every", 10)


@pytest.mark.parametrize(("options", "message"), USELESS)
def test_options_without_use_are_told_at_once(options, message):
    with pytest.raises(OptionError, match=message):
        online(**options)


def test_data_are_for_the_monitor(tmp_path):
    loader = DataLoader(samples(12), batch_size=12, collate_fn=collate)
    callback = online(steps=2, data=loader, monitor={"every": 2, "sources": 3, "probe": 8})
    trainer(tmp_path, callback, data=Stream(), max_steps=3).train()
    assert callback.monitor.history


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(37, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, input_ids, labels, attention_mask):
        logits = self.head(self.norm(self.table(input_ids).mean(1)))
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def test_models_that_cannot_be_measured_are_told_in_the_first_step(tmp_path):
    model, callback = Normalised(), online()
    host = trainer(tmp_path, callback, kind="class", model=model)
    with pytest.raises(ModelError, match=r"statistics of the batch.*refresh='epoch'.*GroupNorm"):
        host.train()
    assert host.state.global_step == 0
    callback.mask.detach()  # the Trainer tells no callback of an error
    assert not hooks_of(model)
    host = trainer(tmp_path, online(), max_steps=2, torch_compile=True)
    with pytest.raises(OptionError, match="cannot see the layers of a compiled model"):
        host.train()


def test_errors_outside_of_steps_leave_no_hooks(tmp_path):
    class Evaluates(TrainerCallback):
        def on_evaluate(self, *_, **__):
            raise RuntimeError("on purpose")

    options = {"eval_data": samples(4), "eval_strategy": "epoch"}
    host = trainer(tmp_path, [online(), Evaluates()], **options)
    with pytest.raises(RuntimeError, match="on purpose"):
        host.train()
    assert not hooks_of(host.model)


def test_a_mask_that_is_never_made(tmp_path):
    with pytest.warns(GradmaskWarning, match="or steps=<a number of steps below 2>"):
        trainer(tmp_path, online(), max_steps=2).train()


@pytest.mark.slow
def test_two_processes(tmp_path):
    here = Path(__file__).parents[1] / "helpers"
    script = [str(here / "trainer_processes.py"), str(tmp_path), "online"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = subprocess.run([*launch, *script], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-5000:]
