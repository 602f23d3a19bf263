"""The Trainer trains the model's own loss, or the callback says that it does not."""

import warnings

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from torch import nn
from trainer_runs import made, own_loss, samples, trainer
from transformers import Trainer

from gradmask.errors import GradmaskWarning
from gradmask.integrations.transformers import FisherMaskCallback

pytestmark = pytest.mark.usefixtures("repeatable")


def told(host):
    """What training warns of, by the callback."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        host.train()
    assert not host.model._forward_hooks
    return [str(w.message) for w in caught if issubclass(w.category, GradmaskWarning)]


class Weighted(Trainer):
    """As the documentation of the Trainer has it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        weight = torch.tensor([1.0, 2.0, 3.0])
        loss = nn.functional.cross_entropy(outputs.logits, labels, weight=weight)
        return (loss, outputs) if return_outputs else loss


class Beside(Weighted):
    """The model gets its labels, and its loss is not used."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


class Penalised(Weighted):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super(Weighted, self).compute_loss(model, inputs)
        return loss + sum(p.square().sum() for p in model.parameters()) * 1e-4


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", [Weighted, Beside])
def test_a_loss_of_its_own(tmp_path, kind, accumulate):
    options = {"kind": "class", "max_steps": 4, "gradient_accumulation_steps": accumulate}
    host = trainer(tmp_path, FisherMaskCallback(0.3, refresh=2), **options)
    host.__class__ = kind
    (message,) = told(host)
    assert "another loss than the model's own" in message
    assert "loss=" in message
    host = trainer(tmp_path, FisherMaskCallback(0.3, refresh=2, loss="cross_entropy"), **options)
    host.__class__ = kind
    assert not told(host)
    host = trainer(tmp_path, FisherMaskCallback(0.3, refresh=2, strategy="random"), **options)
    host.__class__ = kind
    assert not told(host)


def test_a_loss_function(tmp_path):
    def function(outputs, labels, num_items_in_batch=None):
        return own_loss(outputs, labels) / num_items_in_batch

    for options, count in (({}, 1), ({"loss": own_loss}, 0)):
        host = trainer(tmp_path, FisherMaskCallback(0.3, refresh=2, **options), max_steps=3)
        host.compute_loss_func = function
        assert len(told(host)) == count


class Pairs(nn.Module):
    """Returns a tuple, its loss first."""

    def __init__(self):
        super().__init__()
        self.model = made("class")

    def forward(self, input_ids, attention_mask=None, labels=None):
        found = self.model(input_ids, attention_mask, labels=labels, return_dict=False)
        return found if labels is not None else found[0]


@pytest.mark.parametrize("kind", ["own", "penalised", "tuple", "eval first", "half"])
def test_the_models_own_loss(tmp_path, kind):
    options, given = {"kind": "class", "max_steps": 3}, {}
    if kind == "tuple":
        options["model"] = Pairs()
        given["unpack"] = lambda b: ((b["input_ids"], b["attention_mask"]), b["labels"])
    if kind == "eval first":
        options |= {"eval_on_start": True, "eval_strategy": "no", "eval_data": samples(4, "class")}
    if kind == "half":
        options |= {"bf16": True, "gradient_checkpointing": True}
    callback = FisherMaskCallback(0.3, refresh=2, **given)
    host = trainer(tmp_path, callback, **options)
    if kind == "penalised":
        host.__class__ = Penalised
    assert not told(host)
    assert callback.mask.refreshes == 1
