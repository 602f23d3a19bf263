"""Dynamics in the real `Trainer`: those of a plain loop, resumed, and without any other effect."""

import random

import numpy
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from hosts import bert, t5, tokens
from torch.utils.data import DataLoader
from trainer_recording import Watched, assert_scores, texts, watched
from trainer_runs import (
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
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

from gradmask.audit import Dynamics, rank
from gradmask.integrations.transformers import DynamicsCallback, FisherMaskCallback

pytestmark = pytest.mark.usefixtures("repeatable")


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
            # The Trainer takes this model's loss to be scaled by itself.
            (outputs.loss / (1 if host.model_accepts_loss_kwargs else accumulate)).backward()
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


WAYS = [
    ("text", {"gradient_accumulation_steps": 2, "dataloader_num_workers": 2}),
    ("text", {"label_smoothing_factor": 0.1}),
    ("text", {"own_loss": True}),
    ("class", {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 3}),
    ("class", {"eval_data": samples(6, "class"), "eval_strategy": "steps", "eval_steps": 2}),
    ("class", {"bf16": True, "remove_unused_columns": False}),
    *long(
        [
            ("text", {"bf16": True, "gradient_accumulation_steps": 2}),
            ("class", {"torch_compile": True, "torch_compile_backend": "eager"}),
        ]
    ),
]
WAYS = pytest.mark.parametrize(("kind", "options"), WAYS)


@WAYS
def test_nothing_else_changes(tmp_path, kind, options):
    """With dropout, noise of every random state, and a batch that is not full."""
    runs = []
    for attached in (False, True):
        given = {k: v for k, v in options.items() if k != "own_loss"}
        data = samples(22, kind)
        host = trainer(tmp_path, kind=kind, collator=Noisy(), data=data, max_steps=11, **given)
        host.compute_loss_func = cross_entropy if "own_loss" in options else None
        if attached:
            callback = DynamicsCallback.attach(host)
        host.train()
        logs = [log["loss"] for log in host.state.log_history if "loss" in log]
        after = random.random(), float(numpy.random.rand())  # noqa: NPY002
        runs.append((weights(host), logs, torch.rand(3), after))
    assert_same(runs[1][0], runs[0][0])
    assert runs[0][1] == runs[1][1]
    assert torch.equal(runs[0][2], runs[1][2])
    assert runs[0][3] == runs[1][3]
    assert callback.scores()["visits"].sum() >= 11 * 3


@WAYS
def test_the_logits_are_those_that_were_trained(tmp_path, kind, options):
    given = {k: v for k, v in options.items() if k != "own_loss"}
    host, dynamics = watched(
        tmp_path, {}, kind=kind, data=samples(22, kind), shift=kind == "text", num_train_epochs=3,
        **given,
    )  # fmt: skip
    host.compute_loss_func = cross_entropy if "own_loss" in options else None
    loader = host.get_train_dataloader()
    assert set(next(iter(loader))) == {"input_ids", "attention_mask", "labels"}
    host.train()
    assert_scores(dynamics.dynamics, host.expected)
    assert (dynamics.scores()["visits"] == 3).all()
    assert (dynamics.scores()["variability"] > 0).all()


# Models


class Tuples(torch.nn.Module):
    """Returns what older models do."""

    def __init__(self, named):
        super().__init__()
        self.inner, self.named = made("class"), named
        self.config = self.inner.config

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        found = self.inner(input_ids, attention_mask=attention_mask, labels=labels)
        return {"loss": found.loss, "logits": found.logits} if self.named else found.to_tuple()


@pytest.mark.parametrize("named", [True, False])
def test_outputs_of_every_form(tmp_path, named):
    host, dynamics = watched(tmp_path, {}, kind="class", model=Tuples(named), shift=False)
    host.train()
    assert_scores(dynamics.dynamics, host.expected)


def words(labels, n=12):
    """Texts of four tokens, each with a label."""
    found = []
    for seed in range(n):
        row = tokens(seed, (4,))["input_ids"][0]
        found.append({"input_ids": row, "labels": (row + seed) % labels})
    return found


@pytest.mark.parametrize(
    ("kind", "options", "shift"),
    [
        ("TokenClassification", {}, False),
        ("MaskedLM", {}, False),
        ("MaskedLM", {"shift": True}, True),
        ("TokenClassification", {"positions": 4}, False),
        ("T5", {}, False),
        ("T5", {"positions": 4}, False),
        ("GPT2", {"positions": 4}, True),
        ("GPT2", {"shift": False}, False),
    ],
)
def test_which_logits_belong_to_which_labels(tmp_path, kind, options, shift):
    """With four tokens and four classes, where shapes do not tell."""
    torch.manual_seed(0)
    model = t5() if kind == "T5" else made() if kind == "GPT2" else bert(kind, num_labels=4)
    places = {name: value for name, value in options.items() if name == "positions"}
    watch = {**places, "class_dim": -1}
    host, dynamics = watched(
        tmp_path, options, shift=shift, watch=watch, model=model, data=words(4), num_train_epochs=2
    )
    host.train()
    assert_scores(dynamics.dynamics, host.expected)
    visits = dynamics.scores()["visits"]
    if places:
        assert visits.shape == (12, 4)
        assert (visits[:, :3] == 2).all()
        assert (visits[:, 3] == (0 if shift else 2)).all()


@pytest.mark.parametrize("told", [True, False])
def test_several_labels_a_sample(tmp_path, told):
    """Which the model's first call may find by the labels."""
    kind = {"problem_type": "multi_label_classification"} if told else {}
    data = samples(20, "class")
    for n, row in enumerate(data):
        row["labels"] = torch.tensor([n % 2, n % 3 > 0, 1.0])

    def stack(rows):
        batch = collate([{**row, "labels": torch.tensor(0)} for row in rows])
        return {**batch, "labels": torch.stack([row["labels"] for row in rows])}

    options = {"collator": stack, "data": data, "save_strategy": "steps", "save_steps": 7}
    host, dynamics = watched(
        tmp_path, {"positions": 3}, kind="class", model=made("class", **kind), shift=False,
        watch={"positions": 3, "multilabel": True}, **options,
    )  # fmt: skip
    host.train()
    assert_scores(dynamics.dynamics, host.expected)
    again = trainer(tmp_path, kind="class", model=made("class", **kind), **options)
    going = DynamicsCallback.attach(again, positions=3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert_scores(going.dynamics, host.expected)


def test_a_peft_model(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(made(), config)
    host, dynamics = watched(tmp_path, {}, model=model)
    host.train()
    assert_scores(dynamics.dynamics, host.expected)


# Data


def tokenizer():
    library = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, **{f"w{i}": i for i in range(1, 37)}}
    model = library.models.WordLevel(words, unk_token="[PAD]")
    return PreTrainedTokenizerFast(tokenizer_object=library.Tokenizer(model), pad_token="[PAD]")


@pytest.mark.parametrize("grouped", [False, True])
def test_a_data_set_of_hugging_faces(tmp_path, grouped):
    """With text that no model takes, a padding tokenizer, and samples grouped by their length."""
    if grouped and "train_sampling_strategy" in trainer(tmp_path).args.to_dict():
        options = {"train_sampling_strategy": "group_by_length"}
    else:
        options = {"group_by_length": True} if grouped else {}
    options |= {"collator": DataCollatorWithPadding(tokenizer()), "num_train_epochs": 3}
    data = texts()
    host, dynamics = watched(tmp_path, {}, kind="class", shift=False, data=data, **options)
    host.train()
    assert_scores(dynamics.dynamics, host.expected)
    assert (dynamics.scores()["visits"] == 3).all()
    assert host.train_dataset is data
    plain = trainer(tmp_path, kind="class", data=texts(), **options)
    plain.train()
    assert_same(weights(host), weights(plain))


def test_smaller_batches_where_memory_ends(tmp_path, monkeypatch):
    """What was recorded of the batches that were too large does not count."""
    host, dynamics = watched(tmp_path, {}, auto_find_batch_size=True)
    before, calls = Watched.compute_loss, []

    def compute_loss(self, model, inputs, *args, **given):
        found = before(self, model, inputs, *args, **given)
        calls.append(len(inputs["input_ids"]))
        if len(calls) == 2:
            self.watch(True)
            raise RuntimeError("CUDA out of memory.")
        return found

    monkeypatch.setattr(Watched, "compute_loss", compute_loss)
    host.train()
    assert calls[:2] == [4, 4]
    assert max(calls[2:]) < 4
    assert_scores(dynamics.dynamics, host.expected)
    assert (dynamics.scores()["visits"] == 4).all()


@pytest.mark.parametrize("refresh", ["epoch", "online"])
@pytest.mark.parametrize("first", [True, False])
def test_together_with_a_mask(tmp_path, refresh, first):
    masks = [FisherMaskCallback(0.3, refresh=refresh) for _ in range(2)]
    alone = trainer(tmp_path, masks[0])
    alone.train()
    host, dynamics = watched(tmp_path, {}, callback=masks[1] if first else None)
    if not first:
        host.add_callback(masks[1])
    names = set()
    host.model.register_forward_pre_hook(lambda _, __, given: names.update(given), with_kwargs=True)
    host.train()
    assert masks[1].mask.refreshes == 3
    assert_same(weights(host), weights(alone))
    assert_scores(dynamics.dynamics, host.expected)
    assert names <= {"input_ids", "attention_mask", "labels", "num_items_in_batch"}
