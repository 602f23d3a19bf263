"""Batches and losses as Hugging Face's models have them, against each sample's own loss alone."""

import pytest
import torch

pytest.importorskip("transformers")
from hosts import (
    CASES,
    assert_near,
    expected_diagonal,
    gpt2,
    labels_of,
    made,
    sample_gradients,
    tokens,
)
from processes import run_processes
from trainer_runs import long
from transformers import BatchEncoding

from gradmask import FisherMask, InfluenceMonitor, fisher_diagonal, gradient_norms, influence
from gradmask.errors import DataError


@pytest.mark.parametrize("case", CASES)
def test_fisher_is_that_of_the_models_own_loss(case):
    model, data, own = made(case)
    expected = expected_diagonal(model, data, own)
    problem = model.config.problem_type if hasattr(model.config, "problem_type") else None
    found = fisher_diagonal(model, [BatchEncoding(batch) for batch in data])
    assert_near(found, expected)
    assert getattr(model.config, "problem_type", None) == problem  # Transformers notes it there
    assert model.training


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        *(
            (c, k)
            for c in ("bert", "bert-square", "bert-several", "bert-value")
            for k in ("exact", "sampled")
        ),
        *(("gpt2", "sampled"), ("t5", "exact"), *long([("gpt2", "exact"), ("t5", "sampled")])),
    ],
)
def test_other_labels_of_the_fisher(case, kind):
    """The mean over many seeds of the sampled form is the exact one; exact by all labels alone."""
    model, data, _ = made(case)
    cut = lambda v: (v[:2, :3] if v.dim() == 2 and case != "bert-several" else v).contiguous()  # noqa: E731
    data = [{k: cut(v) for k, v in data[1].items()}]
    found = fisher_diagonal(model, data, kind="exact")
    if kind == "sampled":
        several = [fisher_diagonal(model, data, kind=kind, seed=s, verify=False) for s in range(40)]
        name = next(n for n in found if "attention" in n or "attn" in n or "Attention" in n)
        mean = sum(f[name] for f in several) / len(several)
        assert abs(mean.sum() / found[name].sum() - 1) < 0.4
        return
    alone = [
        fisher_diagonal(model, [{k: v[n : n + 1] for k, v in data[0].items()}], kind="exact")
        for n in range(len(data[0]["labels"]))
    ]
    assert_near(found, {name: sum(f[name] for f in alone) / len(alone) for name in found})


@pytest.mark.parametrize("case", ["bert", "gpt2", "llama"])
def test_padding_has_no_influence(case):
    model, data, _ = made(case)
    padded, alone = data[0], []
    for n, length in enumerate(padded["attention_mask"].sum(1).tolist()):
        row = {k: v[n : n + 1] for k, v in padded.items()}
        alone.append({k: v[:, :length] if v.dim() == 2 else v for k, v in row.items()})
    assert_near(fisher_diagonal(model, [padded]), fisher_diagonal(model, alone))


def check_in_shards(rank, world):
    """Each rank has other batches; layers are units, embeddings and head belong to the whole."""
    from torch.distributed.fsdp import fully_shard

    for case in ("bert-tokens", "bert-masked", "gpt2", "gpt2-untied", "llama"):
        model, data, _ = made(case)
        expected = fisher_diagonal(model, data, verify="all")
        layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
        found = fisher_diagonal(model, data[rank::world])
        assert_near({name: value.full_tensor() for name, value in found.items()}, expected)


@pytest.mark.slow
def test_in_shards(tmp_path):
    run_processes(check_in_shards, 2, tmp_path)


@pytest.mark.parametrize(
    ("case", "labelled"),
    [
        *(("bert", True), ("bert", False), ("bert-masked", False), ("llama", True)),
        *long([("bert-tokens", True), ("bert-tokens", False), ("bert-masked", True)]),
        *long([("gpt2", True), ("gpt2", False), ("llama", False)]),
    ],
)
def test_padding_of_a_probe_does_not_count(case, labelled):
    model, data, _ = made(case)
    probe, alone = tokens(5, (3, 2)), []
    if labelled:
        labels = labels_of(probe).clamp(max=3) if case == "bert-tokens" else labels_of(probe)
        probe["labels"] = torch.tensor([0, 2]) if case == "bert" else labels
    for n, length in enumerate((3, 2)):
        row = {k: v[n : n + 1] for k, v in probe.items()}
        alone.append({k: v[:, :length] if v.dim() == 2 else v for k, v in row.items()})
    sources = data[1]
    for method in ("kl", "quadratic"):
        found = influence(model, sources, probe, method=method, pairwise=True)
        each = [influence(model, sources, row, method=method, pairwise=True) for row in alone]
        assert torch.allclose(found, torch.cat(each, 1), rtol=1e-6, atol=1e-30)
    found = influence(model, sources, probe, method="diagonal")
    each = [influence(model, sources, row, method="diagonal") for row in alone]
    assert torch.allclose(found, torch.stack(each).mean(0), rtol=1e-8)
    other = {**probe, "input_ids": probe["input_ids"].clone()}
    other["input_ids"][probe["attention_mask"] == 0] = 7
    for method in ("quadratic", "diagonal"):
        given, changed = (
            influence(model, sources, p, method=method, fisher="sampled") for p in (probe, other)
        )
        assert torch.allclose(given, changed, rtol=1e-8)


def test_influence_of_pairs_by_drawn_labels():
    """The Fisher pass inside has another loss, and must not change what the logits are."""
    model, data, _ = made("bert-tokens")
    sources = {k: v for k, v in data[0].items() if k != "labels"}, data[0]["labels"]
    for method in ("quadratic", "diagonal"):
        options = {"method": method, "fisher": "sampled"}
        found = influence(model, sources, tokens(5, (3, 3)), **options)
        assert torch.allclose(found, influence(model, data[0], tokens(5, (3, 3)), **options))


@pytest.mark.parametrize("case", ["bert", "gpt2", "t5", "vit"])
def test_influence_and_norms(case):
    model, data, own = made(case)
    gradients = list(sample_gradients(model, data[:1], own))
    norms = torch.stack([sum(g.square().sum() for g in row.values()).sqrt() for row in gradients])
    assert torch.allclose(gradient_norms(model, data[0]), norms, rtol=1e-9)
    found = influence(model, data[0], data[1], fisher="empirical", pairwise=True)
    others = list(sample_gradients(model, data[1:2], own))
    products = [[sum((a[n] * b[n]).sum() for n in a) ** 2 for b in others] for a in gradients]
    assert torch.allclose(found, 0.5e-6 * torch.tensor(products).double(), rtol=1e-8)
    assert (influence(model, data[0], data[1]) > 0).all()


def test_monitor_and_mask():
    torch.manual_seed(0)
    model = gpt2()
    data = [{**t, "labels": labels_of(t)} for t in (tokens(s, (6, 6)) for s in range(4))]
    monitor = InfluenceMonitor(model, data, sources=2, probe=3)
    assert monitor.measure()["influence/quadratic/mean"] > 0
    mask = FisherMask(model, keep=0.5)
    mask.refresh(data)
    assert mask.kept_fraction == pytest.approx(0.5, abs=1e-3)


def test_a_loss_of_the_users_gets_the_labels_as_they_are():
    model, data, own = made("gpt2")
    seen = []

    def loss(outputs, labels):
        seen.append(labels.shape)
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")

    assert_near(fisher_diagonal(model, data, loss=loss), expected_diagonal(model, data, own))
    assert torch.Size([1, 9]) in seen


@pytest.mark.parametrize("case", ["bert", "bert-square", "gpt2"])
def test_losses_of_pytorch_score_the_logits(case):
    model, data, own = made(case)
    smoothed = torch.nn.CrossEntropyLoss(label_smoothing=0.2)

    def loss(outputs, labels):
        logits = outputs.logits
        if own == 1:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), reduction="sum", label_smoothing=0.2
        )

    assert_near(
        fisher_diagonal(model, data, loss=smoothed), fisher_diagonal(model, data, loss=loss)
    )
    pairs = [({k: v for k, v in b.items() if k != "labels"}, b["labels"]) for b in data]
    if own != 1:  # as many tokens as classes, in some
        found = fisher_diagonal(model, pairs, loss=smoothed)
        assert_near(found, fisher_diagonal(model, data, loss=loss))
        plain = fisher_diagonal(model, data)
        assert_near(fisher_diagonal(model, pairs), plain)
    absent = 0 if own == 1 else 36
    other = torch.nn.CrossEntropyLoss(label_smoothing=0.2, ignore_index=absent)
    assert_near(fisher_diagonal(model, data, loss=other), fisher_diagonal(model, data, loss=loss))


def test_a_batch_of_another_form():
    model, data, own = made("bert")
    others = [
        {"text": b["input_ids"], "mask": b["attention_mask"], "class": b["labels"]} for b in data
    ]

    def unpack(batch):
        return {"input_ids": batch["text"], "attention_mask": batch["mask"]}, batch["class"]

    expected = expected_diagonal(model, data, own)
    assert_near(fisher_diagonal(model, others, unpack=unpack), expected)

    def with_names(batch):  # scored as the model scores them
        inputs, targets = unpack(batch)
        return {**inputs, "labels": targets}

    assert_near(fisher_diagonal(model, others, unpack=with_names), expected)
    with pytest.raises(DataError, match=r"text, mask, class.*unpack="):
        fisher_diagonal(model, others)
