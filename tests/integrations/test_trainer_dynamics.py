"""Dynamics in the real `Trainer`: those of a plain loop, resumed, and without any other effect."""

import random

import numpy
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from hosts import bert, t5, tokens
from test_trainer import (
    Noisy,
    Ordered,
    assert_same,
    collate,
    long,
    made,
    own_loss,
    samples,
    trainer,
    weights,
)
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast, Trainer

from gradmask.audit import Dynamics, rank
from gradmask.integrations.transformers import DynamicsCallback, FisherMaskCallback

pytestmark = pytest.mark.usefixtures("repeatable")


def assert_scores(found, expected):
    for name, value in expected.scores().items():
        assert torch.equal(found.scores()[name].nan_to_num(-9), value.nan_to_num(-9)), name
    for ours, theirs in zip(found.suggestions(), expected.suggestions(), strict=True):
        assert torch.equal(ours, theirs)


class Watched(Trainer):
    """Knows a batch's samples by their tokens, and updates dynamics with outputs it is given."""

    def watch(self, shift, **options):
        rows = [tuple(torch.as_tensor(row["input_ids"]).tolist()) for row in self.train_dataset]
        assert len(set(rows)) == len(rows)
        self.places = {row: place for place, row in enumerate(rows)}
        self.expected, self.shift = Dynamics(len(rows), **options), shift
        return self

    def compute_loss(self, model, inputs, return_outputs=False, **given):
        labels, texts = inputs["labels"], inputs["input_ids"]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **given)
        if model.training:
            ids = [self.places[tuple(t for t in row if t)] for row in texts.tolist()]
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs[-1]
            if self.shift:
                logits, labels = logits[:, :-1], labels[:, 1:]
            self.expected.update(torch.tensor(ids), logits, labels)
        return (loss, outputs) if return_outputs else loss


def watched(folder, *args, shift=True, watch=None, **options):
    host = trainer(folder, *args, **options)
    host.__class__ = Watched
    return host.watch(shift, **watch or {})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_dynamics_are_those_of_a_plain_loop(tmp_path, accumulate):
    data = samples(24, "class")
    host = trainer(
        tmp_path, kind="class", data=data, gradient_accumulation_steps=accumulate,
        max_grad_norm=0.0, optim="adamw_torch", lr_scheduler_type="constant", weight_decay=0.0,
        num_train_epochs=3, model=made("class", hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0),
    )  # fmt: skip
    host.__class__ = Ordered
    dynamics = DynamicsCallback.attach(host)
    host.train()

    model = made("class", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
    expected = Dynamics(24)
    for _ in range(3):
        for n, batch in enumerate(DataLoader(data, batch_size=4, collate_fn=collate)):
            outputs = model(**batch)
            expected.update(torch.arange(4 * n, 4 * n + 4), outputs.logits, batch["labels"])
            (outputs.loss / accumulate).backward()
            if (n + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    assert_same(weights(host), model.state_dict())
    assert_scores(dynamics.dynamics, expected)
    assert (dynamics.scores()["visits"] == 3).all()
    labels = [int(row["labels"]) for row in data]
    assert torch.equal(rank(dynamics.dynamics, labels).order, rank(expected, labels).order)


def cross_entropy(outputs, labels, num_items_in_batch=None):
    return own_loss(outputs, labels) / num_items_in_batch


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("text", {"gradient_accumulation_steps": 2, "dataloader_num_workers": 2}),
        ("text", {"label_smoothing_factor": 0.1}),
        ("text", {"loss": cross_entropy}),
        ("class", {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 3}),
        ("class", {"eval_data": samples(6, "class"), "eval_strategy": "steps", "eval_steps": 2}),
        ("class", {"torch_compile": True, "torch_compile_backend": "eager"}),
        ("class", {"bf16": True}),
        *long([("text", {"bf16": True, "gradient_accumulation_steps": 2})]),
    ],
    ids=str,
)
def test_nothing_else_changes(tmp_path, kind, options):
    """With dropout, noise of every random state, and a batch that is not full."""
    runs = []
    options, loss = dict(options), options.get("loss")
    options.pop("loss", None)
    for attached in (False, True):
        make = trainer if attached else watched
        more = {} if attached else {"shift": kind == "text"}
        if not attached and options.get("label_smoothing_factor"):
            make, more = trainer, {}  # pops the labels, and is watched below
        collator = Noisy() if kind == "text" and make is trainer else None
        host = make(
            tmp_path, kind=kind, collator=collator, data=samples(22, kind), max_steps=11,
            **more, **options,
        )  # fmt: skip
        host.compute_loss_func = loss
        callback = DynamicsCallback.attach(host) if attached else None
        batches = host.callback_handler
        host.data_collator = host.data_collator if kind == "class" else collate
        host.train()
        logs = [log["loss"] for log in host.state.log_history if "loss" in log]
        after = random.random(), float(numpy.random.rand())  # noqa: NPY002
        runs.append((weights(host), logs, torch.rand(3), after))
        if make is watched:
            expected = host.expected
        assert batches is host.callback_handler
    assert_same(runs[1][0], runs[0][0])
    assert runs[0][1] == runs[1][1]
    assert torch.equal(runs[0][2], runs[1][2])
    assert runs[0][3] == runs[1][3]
    if not options.get("label_smoothing_factor"):
        assert_scores(callback.dynamics, expected)
    assert callback.scores()["visits"].sum() >= 11 * 3
