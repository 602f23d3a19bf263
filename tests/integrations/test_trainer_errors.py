"""What the callback for the Trainer cannot work with, told before training."""

import importlib
import sys

import pytest
import torch
from hosts import bert
from torch.utils.data import DataLoader
from trainer_runs import (
    Stream,
    assert_same,
    collate,
    questions,
    samples,
    trainer,
    weights,
)
from transformers import TrainerCallback

from gradmask.errors import (
    DataError,
    GradmaskWarning,
    OptimizerError,
    OptionError,
)
from gradmask.integrations.transformers import FisherMaskCallback

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("repeatable")


def test_streams_need_other_data(tmp_path):
    host = trainer(tmp_path, FisherMaskCallback(refresh=2), data=Stream(), max_steps=4)
    with pytest.raises(DataError, match=r"Stream.*data="):
        host.train()
    assert host.state.global_step == 0  # not after the first steps
    loader = DataLoader(samples(8), batch_size=4, collate_fn=collate)
    runs = []
    for callback in (None, FisherMaskCallback(1.0, data=loader)):
        host = trainer(tmp_path, callback, data=Stream(), max_steps=12)
        host.train()
        runs.append(weights(host))
    assert callback.mask.refreshes == 2
    assert_same(runs[1], runs[0])


def test_a_mask_that_is_never_made(tmp_path):
    for options in ({"num_train_epochs": 1}, {"max_steps": 4}):
        message = r"training ends after (\d).*refresh='start', or .*number of steps below \1>"
        with pytest.warns(GradmaskWarning, match=message):
            trainer(tmp_path, FisherMaskCallback(), **options).train()
    with pytest.warns(GradmaskWarning, match=r"refresh=30"):
        trainer(tmp_path, FisherMaskCallback(refresh=30), max_steps=4).train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 2

    with pytest.warns(GradmaskWarning, match="training ended after 2 steps"):
        trainer(tmp_path, [FisherMaskCallback(), Stop()]).train()


@pytest.mark.parametrize("refresh", ["epoch", 3])
def test_misfits_are_told_before_training(tmp_path, refresh):
    model, data = bert("QuestionAnswering"), questions()
    options = {"model": model, "data": data, "collator": torch.utils.data.default_collate}
    host = trainer(tmp_path, FisherMaskCallback(refresh=refresh), **options)
    with pytest.raises(DataError, match="start_positions"):
        host.train()
    assert host.state.global_step == 0
    # A random mask is measured on nothing.
    trainer(tmp_path, FisherMaskCallback(refresh=1, strategy="random"), **options).train()


def test_label_smoothing_is_told(tmp_path):
    host = trainer(tmp_path, FisherMaskCallback(refresh=2), max_steps=3, label_smoothing_factor=0.1)
    with pytest.warns(GradmaskWarning, match="without the smoothing"):
        host.train()


def test_what_cannot_work_is_told(tmp_path):
    from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper

    with pytest.raises(OptionError, match="Did you mean 'scope'"):
        FisherMaskCallback(scop="update")
    with pytest.raises(OptionError, match="group"):
        FisherMaskCallback(group=None)
    with pytest.raises(OptionError, match="keep"):
        FisherMaskCallback(2.0)
    with pytest.raises(OptionError, match="refresh"):
        FisherMaskCallback(refresh="never")
    host = trainer(tmp_path, [FisherMaskCallback(), FisherMaskCallback()])
    with pytest.raises(OptionError, match="2 FisherMaskCallbacks"):
        host.train()
    host = trainer(tmp_path, FisherMaskCallback(), max_steps=2)
    host.create_optimizer()
    wrapped = DeepSpeedOptimizerWrapper.__new__(DeepSpeedOptimizerWrapper)
    wrapped.optimizer = host.optimizer
    given = {"model": host.model, "optimizer": wrapped, "train_dataloader": None}
    callback = host.callback_handler.callbacks[-2]
    with pytest.raises(OptimizerError, match="DeepSpeed"):
        callback.on_train_begin(host.args, host.state, host.control, **given)


def test_without_transformers(monkeypatch):
    name = "gradmask.integrations.transformers"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'gradmask\[transformers\]'"):
        importlib.import_module(name)


def test_protected_data_without_use_are_told_before_training(tmp_path):
    old = DataLoader(samples(8), batch_size=4, collate_fn=collate)
    host = trainer(tmp_path, FisherMaskCallback(protect=old))
    with pytest.raises(OptionError, match="which='lowest'"):
        host.train()
    host = trainer(tmp_path, FisherMaskCallback(score="ratio"))
    with pytest.raises(OptionError, match="protect="):
        host.train()
    assert host.state.global_step == 0
    with pytest.raises(OptionError, match="protect="):
        FisherMaskCallback(refresh="online", protect=old, which="lowest")
