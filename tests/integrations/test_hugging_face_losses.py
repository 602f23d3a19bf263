"""Losses of Hugging Face's models and of the user: which are likelihoods, and which are refused."""

from collections import namedtuple

import pytest
import torch
from hosts import (
    assert_near,
    expected_diagonal,
    gpt2,
    language_batches,
    made,
    tokens,
)
from transformers.modeling_outputs import CausalLMOutput

from gradmask import fisher_diagonal, influence
from gradmask.errors import DataError

pytest.importorskip("transformers")


class WithBalance(torch.nn.Module):
    """Its own loss has a term that is not its labels'."""

    def __init__(self):
        super().__init__()
        self.model = gpt2()

    def forward(self, input_ids, attention_mask, labels=None):
        out = self.model(input_ids, attention_mask=attention_mask, labels=labels)
        return CausalLMOutput(None if labels is None else out.loss + 0.1, out.logits)


def test_a_loss_that_is_none_of_the_known_is_refused():
    torch.manual_seed(0)
    data = language_batches()
    with pytest.raises(DataError, match=r"own loss.*of the next token.*Give loss="):
        fisher_diagonal(WithBalance(), data)
    with pytest.raises(DataError, match="Give loss="):  # of which token?
        fisher_diagonal(WithBalance(), data, loss="cross_entropy")


def test_entries_that_the_model_does_not_take():
    extra = [{**batch, "idx": torch.arange(len(batch["labels"]))} for batch in language_batches()]
    with pytest.raises(DataError, match=r"idx.*WithBalance.*unpack="):
        fisher_diagonal(WithBalance(), extra)


class Scoring(torch.nn.Module):
    """A language model with a loss of its own."""

    def __init__(self, own, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = torch.nn.Embedding(37, 8), torch.nn.Linear(8, 37)
        self.own = own
        self.to(dtype)

    def forward(self, input_ids, attention_mask, labels=None):
        logits = self.head(self.table(input_ids).tanh())
        loss = None if labels is None else self.own(logits, labels, attention_mask)
        return CausalLMOutput(loss, logits)


def next_token(logits, labels, mask):
    return torch.nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:])


def mean_of(logits, labels, mask, **options):
    return torch.nn.functional.cross_entropy(logits.mT, labels, **options)


def test_outputs_in_a_plain_dict():
    class Plain(Scoring):
        def forward(self, *args, **kwargs):
            return dict(super().forward(*args, **kwargs))

    found, expected = (fisher_diagonal(m(next_token), language_batches()) for m in (Plain, Scoring))
    assert_near(found, expected)
    found, expected = (
        influence(m(next_token), language_batches()[0], language_batches()[1])
        for m in (Plain, Scoring)
    )
    assert torch.equal(found, expected)


def test_likelihoods_that_cannot_be_told_apart():
    model = Scoring(next_token)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    with pytest.raises(DataError, match="cannot be told from another"):
        fisher_diagonal(model, language_batches())
    model.head.weight.data.normal_(std=1e-3)
    plain = lambda o, y: next_token(o.logits, y, None) * (y[:, 1:] != -100).sum()  # noqa: E731
    assert_near(
        fisher_diagonal(model, language_batches()),
        fisher_diagonal(model, language_batches(), loss=plain),
    )
    half = Scoring(lambda z, y, m: next_token(z, y, m) * (1 + 2**-8), torch.bfloat16)
    half.head.weight.data.mul_(0.05)
    with pytest.raises(DataError, match="Give loss="):
        fisher_diagonal(half, language_batches(), loss="cross_entropy")


PADDED = {
    "ignore": lambda z, y, m: mean_of(z, y, m, ignore_index=0),
    "mask": lambda z, y, m: mean_of(z, y.masked_fill(m == 0, -100), m),
    "weights": lambda z, y, m: mean_of(z, y, m, weight=1 + torch.arange(37).to(z) % 2),
}


@pytest.mark.parametrize("case", PADDED)
def test_a_loss_that_only_later_batches_tell(case):
    data = [tokens(0, (4, 4)), tokens(1, (4, 2))]
    for batch in data:
        batch["labels"] = batch["input_ids"].clone()
    if case == "weights":
        data[0]["labels"].fill_(3)
    with pytest.raises(DataError, match="another than in batches before"):
        fisher_diagonal(Scoring(PADDED[case]), data)


def test_a_small_term_of_the_models_own():
    model = Scoring(lambda z, y, m: next_token(z, y, m) * (1 + 5e-5))
    with pytest.raises(DataError, match=r"own loss.*Give loss="):
        fisher_diagonal(model, language_batches())


def test_named_tuples_go_by_their_names():
    model, data, own = made("bert")
    expected = expected_diagonal(model, data, own)
    Other = namedtuple("Other", "labels attention_mask input_ids")
    assert_near(fisher_diagonal(model, [Other(**batch) for batch in data]), expected)
    model, data, own = made("gpt2")
    Few = namedtuple("Few", "labels input_ids")
    whole = [{k: v for k, v in b.items() if k != "attention_mask"} for b in data]
    found = fisher_diagonal(model, [Few(**batch) for batch in whole])
    assert_near(found, fisher_diagonal(model, whole))


def test_a_model_that_needs_its_labels():
    class Needy(Scoring):
        def forward(self, input_ids, attention_mask, labels=None):
            return super().forward(input_ids + 0 * labels.clamp(min=0), attention_mask, labels)

    with pytest.raises(DataError, match="does not run without its labels"):
        fisher_diagonal(Needy(next_token), language_batches())
