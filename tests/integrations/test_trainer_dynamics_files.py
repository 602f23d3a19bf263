"""Dynamics in the Trainer's checkpoints, on two processes, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
import transformers
from hosts import bert, gpt2, llama, t5
from torch.utils.data import DataLoader, IterableDataset
from trainer_recording import assert_scores, watched
from trainer_runs import assert_same, collate, made, samples, trainer, weights

from gradmask.audit.state_file import load_state
from gradmask.errors import DataError, GradmaskWarning, ModelError, OptionError, StateError
from gradmask.integrations.recording import shifts
from gradmask.integrations.transformers import DynamicsCallback, FisherMaskCallback
from gradmask.integrations.transformers_dynamics import FILE

pytestmark = pytest.mark.usefixtures("repeatable")


@pytest.mark.parametrize(
    ("stop", "options"), [(3, {"gradient_accumulation_steps": 2}), (5, {}), (7, {})]
)
@pytest.mark.parametrize("mask", [False, True])
def test_a_resumed_run_is_one_that_went_on(tmp_path, stop, options, mask):
    """Stopped within an epoch of 5 steps (3 with accumulation) and at its end."""
    options = {"save_strategy": "steps", "save_steps": stop, "max_steps": 13, **options}
    masks = [FisherMaskCallback(0.3, refresh=4) for _ in range(2)] if mask else [None, None]
    host, dynamics = watched(tmp_path, {}, callback=masks[0], **options)
    host.train()
    assert_scores(dynamics.dynamics, host.expected)
    again = trainer(tmp_path, masks[1], **options)
    going = DynamicsCallback.attach(again)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert_same(weights(again), weights(host))
    assert_scores(going.dynamics, host.expected)
    state = dynamics.dynamics.state_dict()
    for name, value in going.dynamics.state_dict().items():
        assert value == state[name] if not torch.is_tensor(value) else value.equal(state[name])


def test_files_beside_the_checkpoints(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    host = trainer(tmp_path / "a", **options)
    dynamics = DynamicsCallback.attach(host)
    host.train()
    folder = tmp_path / "a" / "checkpoint-6"
    found, about = load_state(folder / FILE)
    state = json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]
    assert about == {"run": state["DynamicsCallback"]["attributes"]["run"], "step": 6}
    assert found["counts"].equal(dynamics.dynamics.state_dict()["counts"])
    assert not list(folder.glob(".*tmp"))

    shutil.move(tmp_path / "a", tmp_path / "b")
    path = str(tmp_path / "b" / "checkpoint-3")

    def resume(folder, path=path, **more):
        host = trainer(folder, **options)
        dynamics = DynamicsCallback.attach(host, **more)
        host.train(resume_from_checkpoint=path)
        return dynamics.dynamics

    with pytest.raises(StateError, match=r"step 3 are not in .*checkpoint-3.*resume="):
        resume(tmp_path / "c")
    assert_scores(resume(tmp_path / "c", resume=path), dynamics.dynamics)
    with pytest.raises(StateError, match="'positions': None"):
        resume(tmp_path / "c", resume=path, positions=9)
    shutil.copy(tmp_path / "b" / "checkpoint-6" / FILE, Path(path) / FILE)  # of another step
    with pytest.raises(StateError, match="step 3 are not in"):
        resume(tmp_path / "b")
    (Path(path) / FILE).write_bytes(b"not one")
    with pytest.raises(StateError, match="cannot be read as a file of dynamics"):
        resume(tmp_path / "b")


def test_a_checkpoint_made_without_the_callback(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    trainer(tmp_path, **options).train()
    host = trainer(tmp_path, **options)
    dynamics = DynamicsCallback.attach(host)
    with pytest.warns(GradmaskWarning, match="made without DynamicsCallback"):
        host.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert dynamics.scores()["visits"].sum() == 3 * 4
    assert (tmp_path / "checkpoint-6" / FILE).is_file()


def test_callback_states_made_anew(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    options["restore_callback_states_from_checkpoint"] = True
    host = trainer(tmp_path, **options)
    DynamicsCallback.attach(host)
    host.train()
    again = trainer(tmp_path, **options)
    DynamicsCallback.attach(again)
    with pytest.raises(OptionError, match="leave restore_callback_states_from_checkpoint False"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_each_training_begins_anew(tmp_path):
    host, dynamics = watched(tmp_path, {}, num_train_epochs=2)
    host.train()
    loader = host.callback_handler.train_dataloader
    assert "gradmask_sample_id" not in next(iter(loader))
    host.watch(True)
    host.train()
    assert_scores(dynamics.dynamics, host.expected)
    assert (dynamics.scores()["visits"] == 2).all()


# What cannot be recorded


class Stream(IterableDataset):
    def __iter__(self):
        yield from samples()


def test_what_is_told_at_once(tmp_path, monkeypatch):
    host = trainer(tmp_path, data=Stream(), max_steps=3)
    with pytest.raises(DataError, match=r"\(Stream\) have no indices.*map-style"):
        DynamicsCallback.attach(host)
    host = trainer(tmp_path)
    with pytest.raises(OptionError, match="positions=0"):
        DynamicsCallback.attach(host, positions=0)
    dynamics = DynamicsCallback.attach(host)
    with pytest.raises(OptionError, match="has a DynamicsCallback already"):
        DynamicsCallback.attach(host)
    with pytest.raises(StateError, match=r"after trainer\.train\(\)"):
        dynamics.scores()
    with pytest.raises(OptionError, match=r"DynamicsCallback\.attach\(trainer\)"):
        trainer(tmp_path, DynamicsCallback()).train()
    host = trainer(tmp_path, model=bert("QuestionAnswering"))
    with pytest.raises(OptionError, match="start_positions, end_positions"):
        DynamicsCallback.attach(host)
    host = trainer(tmp_path)
    monkeypatch.setattr(type(host.args), "n_gpu", 2)
    with pytest.raises(OptionError, match=r"2 GPUs in one process.*torchrun"):
        DynamicsCallback.attach(host)


def flattened(rows):
    batch = collate(rows)
    return {name: value.reshape(1, -1)[:, :12] for name, value in batch.items()}


class NoLogits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = made("class")
        self.config = self.inner.config

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return {"loss": self.inner(input_ids, labels=labels).loss}


class OwnLoader(transformers.Trainer):
    def get_train_dataloader(self):
        return [collate(samples(4, "class"))]


class Removing(transformers.Trainer):
    def get_batch_samples(self, *args):
        batches, count = super().get_batch_samples(*args)
        return [
            {k: v for k, v in b.items() if not k.startswith("gradmask")} for b in batches
        ], count


def in_place():
    model = made("class")
    model.compile(backend="eager")
    return model


def floats(rows):
    batch = collate(rows)
    return {**batch, "labels": batch["labels"].float()}


@pytest.mark.parametrize(
    ("options", "kind", "error", "message"),
    [
        ({"collator": flattened}, "text", ModelError, r"4 samples .*shape \(1, 12, 37\).*packing"),
        ({"model": NoLogits}, "class", ModelError, "returned dict.*fused loss"),
        ({"model": in_place}, "class", ModelError, r"compiled in place.*torch_compile=True"),
        ({"host": OwnLoader}, "class", DataError, r"\(a list\) does not put batches"),
        ({"host": Removing}, "class", DataError, "without its samples' numbers"),
        (
            {"model": lambda: bert("SequenceClassification", num_labels=1), "collator": floats},
            "class", OptionError, "regression.*num_labels=2",
        ),
        (
            {"model": lambda: bert("SequenceClassification", problem_type="regression")},
            "class", OptionError, "regression.*num_labels=2",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_recorded(tmp_path, options, kind, error, message):
    """Told before the first optimizer step, and nothing is left behind."""
    options = dict(options)
    kind_of_host, make = options.pop("host", None), options.pop("model", None)
    host = trainer(tmp_path, kind=kind, model=make() if make else None, max_steps=3, **options)
    host.__class__ = kind_of_host or host.__class__
    DynamicsCallback.attach(host)
    before = weights(host)
    with pytest.raises(error, match=message):
        host.train()
    assert_same(weights(host), before)
    assert not host.model._forward_hooks


def test_models_that_shift():
    from transformers import BartConfig, BartForCausalLM, BertConfig, BertLMHeadModel

    small = {"d_model": 8, "vocab_size": 11, "decoder_layers": 1, "decoder_attention_heads": 1}
    bart = BartForCausalLM(BartConfig(**small, decoder_ffn_dim=8, is_decoder=True))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 11}
    decoder = BertLMHeadModel(BertConfig(**sizes, intermediate_size=8, is_decoder=True))
    assert all(map(shifts, (gpt2(), llama(), decoder, torch.nn.DataParallel(gpt2()))))
    others = t5(), bert("MaskedLM"), bert("TokenClassification"), bart, torch.nn.Linear(1, 1)
    assert not any(map(shifts, others))
    # As the models' own losses do it.
    for model in (gpt2(), decoder, bart, bert("MaskedLM")):
        ids = torch.tensor([[1, 2, 3, 4, 5]])
        found = model.eval()(input_ids=ids, labels=ids)
        logits, labels = found.logits, ids
        if shifts(model):
            logits, labels = logits[:, :-1], labels[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        assert torch.allclose(loss, found.loss)


def test_another_loader_of_ones_own(tmp_path):
    class Own(type(trainer(tmp_path))):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, 5, shuffle=True, collate_fn=collate)

    host, dynamics = watched(tmp_path, {}, num_train_epochs=2)
    host.__class__ = type("Both", (type(host), Own), {})
    host.get_train_dataloader = lambda: Own.get_train_dataloader(host)
    host.train()
    assert_scores(dynamics.dynamics, host.expected)
    assert (dynamics.scores()["visits"] == 2).all()


@pytest.mark.slow
def test_two_processes(tmp_path):
    here = Path(__file__).parents[1] / "helpers"
    script = [str(here / "trainer_dynamics_processes.py"), str(tmp_path)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = subprocess.run([*launch, *script], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-5000:]
