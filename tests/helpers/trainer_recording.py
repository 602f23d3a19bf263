"""Training dynamics recorded in a Trainer."""

import pytest
import torch
from trainer_runs import samples, trainer
from transformers import Trainer

from gradmask.audit import Dynamics
from gradmask.integrations.transformers import DynamicsCallback


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


def watched(folder, options, *, shift=True, watch=None, **more):
    """A trainer that knows its dynamics, and the callback that is to find them."""
    host = trainer(folder, **more)
    host.__class__ = Watched
    return host.watch(shift, **watch or {}), DynamicsCallback.attach(host, **options)


def texts(n=21):
    datasets = pytest.importorskip("datasets")
    rows = [{k: v.tolist() for k, v in row.items()} for row in samples(n, "class")]
    table = {"text": [f"text {i}" for i in range(n)], "label": [r["labels"] for r in rows]}
    table["input_ids"] = [r["input_ids"] for r in rows]
    table["length"] = [len(r["input_ids"]) for r in rows]
    return datasets.Dataset.from_dict(table)
