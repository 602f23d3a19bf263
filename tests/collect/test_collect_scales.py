"""What a training loss multiplies the samples' own by; models that have a loss of their own."""

import pytest
import torch
import torch.nn.functional as F
from cases import Net, assert_close, batches, floats, randomise, stack, to_dtype, tokens
from collecting_models import collected, language_model, text, vector
from torch import nn

from gradmask import FisherMask, fisher_diagonal
from gradmask.errors import GradmaskWarning


@pytest.fixture(autouse=True)
def _repeatable(repeatable):
    """In all tests here."""


def ignoring(targets):
    generator = torch.Generator().manual_seed(3)
    drawn = torch.rand(targets.shape, generator=generator) < 0.6
    drawn[0] = False
    return targets.masked_fill(drawn, -100)


SCALES = {
    "sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "mean": F.cross_entropy,
    "scaled": lambda z, y: F.cross_entropy(z, y) * 2.0**16,
    "accumulated": lambda z, y: F.cross_entropy(z, y) / 4,
    "in another type": lambda z, y: F.cross_entropy(z.float(), y) * 3,
}


@pytest.mark.parametrize("loss", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("criterion", [None, "cross_entropy", nn.CrossEntropyLoss()], ids=str)
@pytest.mark.parametrize("positions", [(), (7,)], ids=["samples", "tokens"])
def test_scales_of_the_loss_are_seen(loss, criterion, positions):
    if positions:
        model = randomise(language_model("table", True))
        data = [(x, ignoring(y)) for x, y in batches(text, (3, 2), 6, positions)]
    else:
        model = randomise(stack(nn.Linear(5, 4)))
        data = batches(vector)
    found = collected(model, data, loss, {"loss": criterion})
    tolerance = 1e-5 if loss is SCALES["in another type"] else 1e-9
    assert_close(found, fisher_diagonal(model, data), tolerance)


def test_positions_that_count_may_be_rare():
    model = randomise(language_model("table", False))
    data = batches(tokens(8), (80,), 6, (8,))
    data[0][1][:, [0, 2, 4, 6]] = -100
    data[0][1][:40] = -100
    assert_close(collected(model, data), fisher_diagonal(model, data), 1e-9)


def test_a_penalty_is_no_part_of_a_sample():
    model, data = randomise(stack(nn.Linear(5, 4))), batches(vector, (3, 1, 2))
    penalty = lambda z, y: F.cross_entropy(z, y) + model.layers[0].weight.square().sum()  # noqa: E731
    assert_close(collected(model, data, penalty), fisher_diagonal(model, data), 1e-9)


@pytest.mark.parametrize("form", [tuple, dict])
def test_logits_beside_the_loss(form):
    def forward(m, x):
        z = m.inner(x)
        return {"loss": z.mean(), "logits": z} if form is dict else (z.mean(), z)

    model, data = randomise(Net(forward, inner=nn.Linear(5, 4))), batches(vector)
    logits = lambda outputs: outputs["logits"] if form is dict else outputs[1]  # noqa: E731
    found = collected(model, data, lambda z, y: F.cross_entropy(logits(z), y, reduction="sum"))
    truth = fisher_diagonal(model.inner, data)
    assert_close(found, {f"inner.{name}": t for name, t in truth.items()}, 1e-9)


def test_classes_last():
    def forward(m, x):
        return m.inner(x).mT

    model = Net(forward, inner=randomise(language_model("parameter", False)))
    data = batches(text, (3, 2), 6, (7,))
    found = collected(model, data, lambda z, y: F.cross_entropy(z.mT, y))
    assert_close(
        found, {f"inner.{n}": t for n, t in fisher_diagonal(model.inner, data).items()}, 1e-9
    )


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("outputs", [0, 1, 3])
def test_bernoulli(reduction, outputs):
    model = randomise(
        Net(
            lambda m, x: m.fc(x).squeeze(-1) if not outputs else m.fc(x),
            fc=nn.Linear(5, outputs or 1),
        )
    )
    shape = (outputs,) if outputs else ()
    data = [(vector(n), torch.randint(2, (n, *shape)).double()) for n in (3, 4)]
    loss = lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction=reduction)  # noqa: E731
    found = collected(model, data, loss, {"loss": "bernoulli"})
    assert_close(found, fisher_diagonal(model, data, loss="bernoulli"), 1e-9)


def test_a_given_scale():
    model = randomise(Net(lambda m, x: m.fc(x), fc=nn.Linear(5, 3)))
    data = [(vector(4), floats(3)(4)) for _ in range(2)]
    found = collected(model, data, F.mse_loss, {"loss": "mse"}, scale=2 / 12)
    assert_close(found, fisher_diagonal(model, data, loss="mse"), 1e-9)


def test_memorised_samples_have_a_scale():
    model = nn.Sequential(nn.Linear(5, 4))
    with torch.no_grad():
        model[0].weight.mul_(0.3)
        model[0].bias.copy_(torch.tensor([13.0, 0, 0, 0]))
    data = [(vector(6).float(), torch.zeros(6, dtype=torch.long))]
    found = collected(model, data, lambda z, y: F.cross_entropy(z, y) * 2.0**16)
    assert_close(found, fisher_diagonal(model, data), 0.1)


@pytest.mark.parametrize("factor", [1.0, 2.0**16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_smoothed_labels(factor, dtype):
    model = randomise(stack(nn.Linear(5, 4)))
    data = batches(vector)
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
    truth = fisher_diagonal(model, data, loss=smoothed)
    model.to(dtype)
    found = collected(
        model, to_dtype(data, dtype), lambda z, y: factor * smoothed(z, y), {"loss": smoothed}
    )
    assert_close(found, truth, 1e-9 if dtype == torch.float64 else 1e-3)


def test_log_probabilities():
    model = randomise(Net(lambda m, x: m.fc(x).log_softmax(-1), fc=nn.Linear(5, 4)))
    data = batches(floats(3, 5), positions=(3,))
    found = collected(model, data, lambda z, y: F.nll_loss(z.mT, y))
    assert_close(found, fisher_diagonal(model, data), 1e-9)


def test_what_cannot_be_read_is_told_once():
    model = randomise(stack(nn.Linear(5, 4)))
    data = batches(vector)
    weighted = nn.CrossEntropyLoss(torch.tensor([0.1, 0.5, 1.0, 2.0]).double())
    with pytest.warns(GradmaskWarning, match="1/N"):
        collected(model, data, weighted)
    collected(model, data, weighted, {"loss": lambda z, y: weighted(z, y)})


def huggingface(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 11, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if kind == "GPT-2":
        none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = transformers.GPT2Config(
            vocab_size=11, n_positions=9, n_embd=8, n_layer=2, n_head=2, **none
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, **sizes
    )
    if kind == "BERT":
        return transformers.BertForMaskedLM(config)
    return transformers.BertForSequenceClassification(config)


def labelled(kind, n):
    x = torch.randint(11, (n, 7))
    y = torch.randint(2, (n,)) if kind == "a classifier" else torch.where(x < 5, -100, x)
    if kind != "a classifier":
        y[:, 1] = x[:, 1]
    mask = torch.ones_like(x)
    mask[0, 5:] = 0
    if kind != "a classifier":
        y = y.masked_fill(mask == 0, -100)
    return {"input_ids": x, "attention_mask": mask, "labels": y}


@pytest.mark.parametrize("kind", ["GPT-2", "BERT", "a classifier"])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_hugging_face(kind, checkpoints):
    model = huggingface(kind).double()
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    data = [labelled(kind, n) for n in (3, 4, 1)]
    given = [(batch, None) for batch in data]
    found = collected(model, given, lambda outputs, _: outputs.loss * 7)
    truth = fisher_diagonal(model, data)
    assert found.keys() == truth.keys()
    for name, t in truth.items():  # the loss is float32, and there is no gradient of some
        torch.testing.assert_close(found[name], t, rtol=1e-6, atol=1e-30, msg=name)


def test_weights_are_told_in_large_batches_too():
    """Where the largest gradients alone look like those of another factor."""
    model = randomise(stack(nn.Linear(5, 3)))
    x = torch.randn(256, 5, dtype=torch.float64)
    y = (torch.rand(256, 4) < 0.3).double()
    weighted = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(10.0).double())
    with pytest.warns(GradmaskWarning, match="1/N"):
        collected(model, [(x, y)], weighted, {"loss": "bernoulli"})


def test_smoothed_labels_under_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 10))
    data = [(torch.randn(64, 5), torch.randint(10, (64,)))]
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
    truth = fisher_diagonal(model, data, loss=smoothed)
    with FisherMask(model, loss=smoothed).collect() as collector:
        with torch.autocast("cpu", torch.bfloat16):
            loss = smoothed(model(data[0][0]), data[0][1])
        loss.backward()
    found, expected = (
        sum(t.sum().item() for t in f.values()) for f in (collector.diagonal(), truth)
    )
    assert found == pytest.approx(expected, rel=0.05)
