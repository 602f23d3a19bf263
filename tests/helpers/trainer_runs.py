"""Models, data and a Trainer of Transformers."""

import random

import numpy
import pytest
import torch
from hosts import bert, gpt2, labels_of, tokens
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments


def long(cases):
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def samples(n=20, kind="text"):
    """Texts of different lengths, with the next token or one of three classes as labels."""
    found = []
    for seed in range(n):
        row = tokens(seed, (4 + seed % 5,))
        labels = labels_of(row) if kind == "text" else torch.tensor([seed % 3])
        found.append({"input_ids": row["input_ids"][0], "labels": labels[0]})
    return found


def collate(rows):
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for n, row in enumerate(rows):
        ids[n, : len(row["input_ids"])] = row["input_ids"]
        if row["labels"].dim():
            labels[n, : len(row["labels"])] = row["labels"]
    if not rows[0]["labels"].dim():
        labels = torch.stack([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def own_loss(outputs, labels):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")


class Noisy:
    """Draws at random, of all that may be drawn from, and of a generator of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, rows):
        batch = collate(rows)
        shape = batch["input_ids"].shape
        noise = torch.rand(shape) + torch.rand(shape, generator=self.generator)
        noise = noise + random.random() + torch.tensor(numpy.random.rand(*shape)).float()  # noqa: NPY002
        changed = (batch["input_ids"] + (noise * 10).long()) % 36 + 1
        batch["input_ids"] = changed * batch["attention_mask"]
        return batch


def made(kind="text", **more):
    torch.manual_seed(0)
    if kind == "text":
        return gpt2(**more)
    return bert("SequenceClassification", num_labels=3, **more)


def trainer(folder, callback=None, *, kind="text", model=None, data=None, collator=None, **options):
    chosen = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "per_device_train_batch_size": 4, "learning_rate": 0.05, "weight_decay": 0.1,
        "save_strategy": "no", "logging_steps": 1, "num_train_epochs": 4, "seed": 5,
        "dataloader_pin_memory": False, **options,
    }  # fmt: skip
    eval_data = chosen.pop("eval_data", None)
    callbacks = [callback] if callback and not isinstance(callback, list) else callback
    return Trainer(
        model or made(kind),
        TrainingArguments(**chosen),
        train_dataset=samples(kind=kind) if data is None else data,
        eval_dataset=eval_data,
        data_collator=collator or collate,
        callbacks=callbacks,
    )


def weights(host):
    return {name: w.clone() for name, w in host.model.state_dict().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


class Ordered(Trainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(samples())


def questions(n=8):
    """Texts with the places where an answer begins and ends."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 37, (n, 9), generator=generator)
    ends = torch.randint(9, (n, 2), generator=generator).sort(1).values
    names = "input_ids", "start_positions", "end_positions"
    rows = zip(ids, ends[:, 0], ends[:, 1], strict=True)
    return [dict(zip(names, row, strict=True)) for row in rows]
