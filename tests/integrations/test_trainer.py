"""The mask in the real `Trainer`: as in a plain loop, resumed, and without any other effect."""

import json
import random
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from hosts import bert
from torch.utils.data import DataLoader
from trainer_runs import (
    Noisy,
    Ordered,
    assert_same,
    collate,
    long,
    made,
    own_loss,
    questions,
    samples,
    trainer,
    weights,
)
from transformers import EarlyStoppingCallback, TrainerCallback

from gradmask import FisherMask, fisher_diagonal, load_masks
from gradmask.errors import (
    GradmaskWarning,
    OptionError,
    StateError,
)
from gradmask.integrations.transformers import FILE, FisherMaskCallback

pytestmark = pytest.mark.usefixtures("repeatable")


def differ(found, expected):
    return any(not torch.equal(value, found[name]) for name, value in expected.items())


class Seen(TrainerCallback):
    """Batches, norms and masks of a run as they were."""

    def __init__(self, callback):
        self.callback, self.masks = callback, []

    def on_step_begin(self, *_, **__):
        self.masks.append(dict(self.callback.mask.masks))


@pytest.mark.parametrize(
    ("scope", "accumulate"),
    [("update", 1), ("gradient", 2), *long([("gradient", 1), ("update", 2)])],
)
def test_weights_are_those_of_a_plain_loop(tmp_path, scope, accumulate):
    data, steps, each = samples(24), 21, 6 // accumulate
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    host = trainer(
        tmp_path, FisherMaskCallback(0.3, scope=scope), model=made(**still), data=data,
        max_steps=steps, gradient_accumulation_steps=accumulate, max_grad_norm=0.5,
        optim="adamw_torch", lr_scheduler_type="constant",
    )  # fmt: skip
    host.__class__ = Ordered
    host.train()

    model = made(**still)
    options = {"lr": 0.05, "betas": (0.9, 0.999), "eps": 1e-8}
    decayed = [p for n, p in model.named_parameters() if "bias" not in n and "ln_" not in n]
    others = [p for n, p in model.named_parameters() if "bias" in n or "ln_" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, **options)
    mask = FisherMask(model, 0.3)  # makes the masks, and is attached to nothing
    loader = DataLoader(data, batch_size=4, collate_fn=collate)
    batches = list(loader)
    for step in range(steps):
        if step and step % each == 0:
            mask.refresh(loader)
        some = [batches[(step * accumulate + i) % 6] for i in range(accumulate)]
        count = host._get_num_items_in_batch(some, "cpu")
        optimizer.zero_grad()
        model.train()
        for batch in some:
            model(**batch, num_items_in_batch=count).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            if mask.masks:
                p.grad[~mask.masks[name]] = 0
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if mask.masks and scope == "update":
                    p[~mask.masks[name]] = before[name][~mask.masks[name]]
    assert mask.refreshes == (steps - 1) // each
    assert_same(weights(host), model.state_dict())


@pytest.mark.parametrize(
    ("refresh", "workers"), [("epoch", 0), (3, 0), *long([("start", 0), (3, 2)])]
)
def test_nothing_else_changes(tmp_path, refresh, workers):
    """With all kept the run is that without a callback: order, noise, dropout, the logs."""
    runs = []
    for callback in (None, FisherMaskCallback(1.0, refresh=refresh, max_samples=7)):
        host = trainer(
            tmp_path, callback, collator=Noisy(), max_steps=11, dataloader_num_workers=workers
        )
        host.train()
        logs = [log["loss"] for log in host.state.log_history if "loss" in log]
        after = random.random(), float(numpy.random.rand())  # noqa: NPY002
        runs.append((weights(host), logs, torch.rand(3), after))
    assert callback.mask.refreshes == {"epoch": 2, "start": 1, 3: 3}[refresh]
    assert_same(runs[1][0], runs[0][0])
    assert runs[0][1] == runs[1][1]
    assert torch.equal(runs[0][2], runs[1][2])
    assert runs[0][3] == runs[1][3]


@pytest.mark.parametrize(
    ("refresh", "scope", "stop"),
    [
        ("epoch", "gradient", 5),
        ("epoch", "gradient", 7),
        (3, "update", 10),
        *long([("epoch", "update", 10), (3, "update", 3), (3, "gradient", 7)]),
        *long([("start", "gradient", 5), ("start", "update", 7)]),
    ],
)
def test_a_resumed_run_is_one_that_went_on(tmp_path, refresh, scope, stop):
    """Stopped within an epoch of 5 steps and at its end, where the Trainer calls no `epoch end`."""
    options = {"save_strategy": "steps", "save_steps": stop, "max_steps": 13, "data": samples()}
    options["logging_steps"] = 4

    def callback():
        return FisherMaskCallback(0.3, refresh=refresh, scope=scope, max_samples=11)

    whole = callback()
    host = trainer(tmp_path, whole, **options)
    seen = Seen(whole)
    host.add_callback(seen)
    host.train()
    going = callback()
    again = trainer(tmp_path, going, **options, model=made())
    seen_again = Seen(going)
    again.add_callback(seen_again)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert len(seen_again.masks) == 13 - stop
    for found, expected in zip(seen_again.masks, seen.masks[stop:], strict=True):
        assert_same(found, expected)
    assert going.mask.refreshes == whole.mask.refreshes > 0
    assert_same(weights(again), weights(host))
    norms = [[log.get("grad_norm") for log in h.state.log_history] for h in (host, again)]
    assert norms[0] == norms[1]


def test_files_beside_the_checkpoints(tmp_path):
    callback = FisherMaskCallback(0.3, refresh=2)
    host = trainer(tmp_path, callback, save_strategy="steps", save_steps=3, max_steps=6)
    host.train()
    assert_same(load_masks(tmp_path / "checkpoint-6" / FILE), callback.mask.masks)
    sums = set()
    for step in (3, 6):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        sums.add(state["stateful_callbacks"]["FisherMaskCallback"]["attributes"]["sha256"])
    assert callback.mask.sha256() in sums
    assert len(sums) == 2


def test_resuming_needs_the_right_file(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    host = trainer(tmp_path / "a", FisherMaskCallback(0.3, refresh=2), **options)
    host.train()
    shutil.move(tmp_path / "a", tmp_path / "b")
    path = str(tmp_path / "b" / "checkpoint-3")

    def resume(folder, **more):
        host = trainer(folder, FisherMaskCallback(0.3, refresh=2, **more), **options)
        host.train(resume_from_checkpoint=path)
        return host

    with pytest.raises(StateError, match=r"step 3 is not in .*checkpoint-3.*resume="):
        resume(tmp_path / "c")
    assert_same(weights(resume(tmp_path / "c", resume=path)), weights(host))
    other = trainer(tmp_path / "b", FisherMaskCallback(0.4, refresh=2), **options)
    with pytest.raises(StateError, match=r"keep=0\.3"):
        other.train(resume_from_checkpoint=path)
    # The mask of another checkpoint in the right place.
    shutil.copy(tmp_path / "b" / "checkpoint-6" / FILE, tmp_path / "b" / "checkpoint-3" / FILE)
    with pytest.raises(StateError, match="step 3 is not in"):
        resume(tmp_path / "b")


def test_a_checkpoint_made_without_the_callback(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    trainer(tmp_path, **options).train()
    callback = FisherMaskCallback(0.3, refresh=2)
    host = trainer(tmp_path, callback, **options)
    with pytest.warns(GradmaskWarning, match="made without FisherMaskCallback"):
        host.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert callback.mask.refreshes == 1


@pytest.mark.slow
def test_callback_states_made_anew(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    expected = trainer(tmp_path, FisherMaskCallback(0.3, refresh=2), **options)
    expected.train()
    options["restore_callback_states_from_checkpoint"] = True
    host = trainer(tmp_path, FisherMaskCallback(0.3, refresh=2), **options)
    path = str(tmp_path / "checkpoint-3")
    host.train(resume_from_checkpoint=path)
    assert_same(weights(host), weights(expected))
    with_loss = {"loss": own_loss, "kind": "empirical"}
    with_loss["monitor"] = {"every": 50, "sources": 2, "probe": 2, "fisher": "empirical"}
    shutil.rmtree(tmp_path)
    callback = FisherMaskCallback(0.3, refresh=2, **with_loss)
    trainer(tmp_path, callback, **options).train()
    with pytest.raises(OptionError, match="without loss, monitor, which trainer_state"):
        trainer(tmp_path, callback, **options).train(resume_from_checkpoint=path)


def test_half_precision(tmp_path):
    """In autocast to bfloat16 the weights stay float32; the mask holds."""
    model = made("class")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    callback = FisherMaskCallback(0.3, refresh="start", scope="update")
    host = trainer(
        tmp_path, callback, kind="class", model=model, bf16=True, max_steps=8, save_steps=5,
        save_strategy="steps", gradient_accumulation_steps=2,
    )  # fmt: skip
    host.train()
    assert host.accelerator.mixed_precision == "bf16"
    assert callback.mask.kept_fraction == pytest.approx(0.3, abs=0.01)
    for name, p in model.named_parameters():
        moved = p != before[name]
        assert moved.any() == callback.mask.masks[name].any()
        assert not (moved & ~callback.mask.masks[name]).any()


def test_the_best_model_at_the_end_and_training_again(tmp_path):
    callback = FisherMaskCallback(0.3, scope="update")
    host = trainer(
        tmp_path, [callback, EarlyStoppingCallback(3)], eval_data=samples(8), num_train_epochs=3,
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        greater_is_better=True,  # so that the best is not the last
    )  # fmt: skip
    host.train()
    best = host.state.best_model_checkpoint
    assert (callback.mask.refreshes, host.state.global_step) == (2, 15)
    assert not best.endswith("-15")
    first = callback.mask
    host.train()  # from these weights on, with masks of its own
    assert callback.mask is not first
    assert callback.mask.refreshes == 2
    optimizer = host.optimizer.optimizer
    assert not optimizer._optimizer_step_pre_hooks


def test_the_share_is_in_the_logs(tmp_path, capsys):
    callback = FisherMaskCallback(0.3, refresh=2, monitor={"every": 3, "sources": 3, "probe": 8})
    host = trainer(tmp_path, callback, max_steps=4)
    host.train()
    logs = [log for log in host.state.log_history if "loss" in log]
    assert [log["fisher_mask/kept"] for log in logs[:2]] == [1.0, callback.mask.kept_fraction]
    assert "influence/quadratic/mean" not in logs[1]
    record = callback.monitor.history[-1]
    assert record["step"] == 3
    assert logs[2]["influence/quadratic/mean"] == record["influence/quadratic/mean"] > 0
    assert "fisher_mask/kept" in capsys.readouterr().out
    assert "fisher_mask/kept" not in host.state.log_history[-1]  # the summary


@pytest.mark.slow
def test_the_monitor_changes_nothing(tmp_path):
    runs = []
    for monitor in (None, {"every": 2, "sources": 3, "probe": 8}):
        host = trainer(
            tmp_path, FisherMaskCallback(0.3, refresh=3, monitor=monitor), collator=Noisy(),
            max_steps=7,
        )  # fmt: skip
        host.train()
        runs.append(weights(host))
    assert_same(runs[1], runs[0])


def test_question_answering_of_the_documentation(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    (shown,) = (b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "start_positions" in b)
    names = {"torch": torch, "F": torch.nn.functional, "FisherMaskCallback": FisherMaskCallback}
    exec(shown, names)
    callback, model, data = names["callback"], bert("QuestionAnswering"), questions()
    collator = torch.utils.data.default_collate
    host = trainer(
        tmp_path, callback, model=model, data=data, collator=collator, num_train_epochs=2,
        label_names=["start_positions", "end_positions"],
    )  # fmt: skip
    host.train()
    assert callback.mask.refreshes == 1
    model.eval()
    loader = DataLoader(data, batch_size=4)
    ours = fisher_diagonal(model, loader, **callback.options)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {name: torch.zeros_like(p) for name, p in trained.items()}
    for row in data:
        loss = model(**{name: value[None] for name, value in row.items()}).loss
        found = torch.autograd.grad(loss, list(trained.values()))
        for total, gradient in zip(expected.values(), found, strict=True):
            total += gradient**2 / len(data)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes(tmp_path, engine):
    here = Path(__file__).parents[1] / "helpers"
    script = [str(here / "trainer_processes.py"), str(tmp_path), engine]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = subprocess.run([*launch, *script], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-5000:]


def test_the_example(capsys):
    example = Path(__file__).parents[2] / "examples" / "trainer.py"
    runpy.run_path(str(example), run_name="__main__")
    assert "share that learns: 0.25" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"score": "ratio"}, {"which": "lowest"}])
def test_protected_data_are_those_of_the_mask(tmp_path, options):
    old = DataLoader(samples(8), batch_size=4, collate_fn=collate)
    callback = FisherMaskCallback(0.3, refresh="start", protect=old, max_samples=None, **options)
    host = trainer(tmp_path, callback, max_steps=1)
    host.train()
    mask = FisherMask(made(), 0.3, max_samples=None, **options)
    mask.refresh(DataLoader(samples(), batch_size=4, collate_fn=collate), protect=old)
    assert mask.kept_fractions == callback.mask.kept_fractions
    assert_same(callback.mask.masks, mask.masks)
