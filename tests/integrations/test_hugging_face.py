"""Batches and losses as Hugging Face's models have them, against each sample's own loss alone."""

from collections import namedtuple

import pytest
import torch

pytest.importorskip("transformers")
from hosts import bert, gpt2, labels_of, language_batches, llama, t5, tokens, vit, with_labels
from processes import run_processes
from transformers import BatchEncoding
from transformers.modeling_outputs import CausalLMOutput

from gradmask import FisherMask, InfluenceMonitor, fisher_diagonal, gradient_norms, influence
from gradmask.errors import DataError


def classes(n):
    return lambda g, shape: torch.randint(n, shape[:1], generator=g)


def token_classes(g, shape):
    labels = torch.randint(4, shape, generator=g)
    return labels.masked_fill(torch.rand(shape, generator=g) < 0.3, -100)


def several(g, shape):
    return torch.randint(2, (shape[0], 3), generator=g).float()


def values(n):
    return lambda g, shape: torch.randn(shape[0], *[n] * (n > 1), generator=g).double()


def images():
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(n, 3, 8, 8, generator=generator).double(),
            "labels": torch.randint(5, (n,), generator=generator),
        }
        for n in (3, 2)
    ]


def summaries():
    found = language_batches()
    for seed, batch in enumerate(found):
        target = tokens(10 + seed, [3 + i for i in range(len(batch["labels"]))])
        batch["labels"] = labels_of(target)
    return found


def counted(own, labels):
    """What the model's own mean is over."""
    if isinstance(own, str):
        return {"one": 1, "half": labels[0].numel() / 2, "all": labels[0].numel()}[own]
    return int((labels[:, own:] != -100).sum())


def sequence(**options):
    return bert("SequenceClassification", **options)


# Model, batches, and what turns the model's own loss of a sample into the sum over its parts:
# positions that count (from which on), or the mean of squares into the Gaussian's half sum.
CASES = {
    "bert": (lambda: sequence(num_labels=3), with_labels(classes(3)), "one"),
    "bert-tokens": (
        lambda: bert("TokenClassification", num_labels=4),
        with_labels(token_classes),
        0,
    ),
    # As many tokens as classes, and as samples.
    "bert-square": (
        lambda: bert("TokenClassification", num_labels=4),
        with_labels(token_classes, ((4, 3, 4, 2), (4, 4))),
        0,
    ),
    "bert-masked": (lambda: bert("MaskedLM"), language_batches(), 0),
    "bert-several": (
        lambda: sequence(num_labels=3, problem_type="multi_label_classification"),
        with_labels(several),
        "all",
    ),
    "bert-untold": (lambda: sequence(num_labels=3), with_labels(several), "all"),
    "bert-value": (lambda: sequence(num_labels=1), with_labels(values(1)), "half"),
    "bert-values": (
        lambda: sequence(num_labels=2, problem_type="regression"),
        with_labels(values(2)),
        "half",
    ),
    "gpt2": (gpt2, language_batches(), 1),
    "gpt2-untied": (lambda: gpt2(tie_word_embeddings=False), language_batches(), 1),
    "llama": (llama, language_batches(), 1),
    "t5": (t5, summaries(), 0),
    "vit": (vit, images(), "one"),
}


def made(case):
    make, data, own = CASES[case]
    torch.manual_seed(0)
    model = make().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model, data, own


def own_loss(model, row, own):
    """The sum over what counts in a sample."""
    outputs = model(**row)
    if own == 1:  # of the next token, for which Transformers goes to float32
        logits, targets = outputs.logits[:, :-1].mT, row["labels"][:, 1:]
        total = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        own_total = outputs.loss.item() * counted(own, row["labels"])
        assert own_total == pytest.approx(total.item(), rel=1e-5)
        return total
    return outputs.loss * counted(own, row["labels"])


def sample_gradients(model, data, own):
    model.eval()
    named = dict(model.named_parameters())
    for batch in data:
        for n in range(len(batch["labels"])):
            row = {k: v[n : n + 1] for k, v in batch.items()}
            total = own_loss(model, row, own)
            gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
            yield {
                name: torch.zeros_like(p) if g is None else g
                for (name, p), g in zip(named.items(), gradients, strict=True)
            }
    model.train()


def expected_diagonal(model, data, own):
    found = list(sample_gradients(model, data, own))
    return {name: sum(g[name] ** 2 for g in found) / len(found) for name in found[0]}


def assert_near(found, expected, near=1e-9):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        largest = value.abs().max()
        assert (found[name] - value).abs().max() <= near * largest + 1e-25, name


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
    "case", ["bert", "bert-square", "gpt2", "t5", "bert-several", "bert-value"]
)
@pytest.mark.parametrize("kind", ["exact", "sampled"])
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


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("case", ["bert", "bert-tokens", "bert-masked", "gpt2", "llama"])
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
