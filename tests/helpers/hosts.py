"""Small models of Hugging Face's, made from configurations, and batches as their collators give."""

import pytest
import torch

VOCABULARY = 37


def _sizes(**more):
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        **more,
    }


def bert(kind, **more):
    import transformers

    config = transformers.BertConfig(**_sizes(max_position_embeddings=12), **more)
    return getattr(transformers, f"BertFor{kind}")(config)


def gpt2(**more):
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=12,
        bos_token_id=0, eos_token_id=0, **more,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama(**more):
    import transformers

    config = transformers.LlamaConfig(**_sizes(num_key_value_heads=1), **more)
    return transformers.LlamaForCausalLM(config)


def t5():
    import transformers

    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0, relative_attention_num_buckets=6,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def vit(labels=5):
    import transformers

    sizes = _sizes(image_size=8, patch_size=4, num_labels=labels)
    sizes.pop("vocab_size")
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))


def tokens(seed=0, lengths=(9, 4, 7)):
    """Token ids padded on the right, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def labels_of(batch):
    """The tokens as labels, padding left out."""
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def language_batches(lengths=((9, 4, 7), (5, 8), (3,))):
    """Batches of different sizes and lengths."""
    found = [tokens(seed, some) for seed, some in enumerate(lengths)]
    return [{**batch, "labels": labels_of(batch)} for batch in found]


def with_labels(make, lengths=((9, 4, 7), (5, 8), (3,))):
    """The same with labels `make(generator, shape)`, of samples or of tokens."""
    found = []
    for seed, some in enumerate(lengths):
        batch = tokens(seed, some)
        generator = torch.Generator().manual_seed(seed)
        found.append({**batch, "labels": make(generator, batch["input_ids"].shape)})
    return found


def classes(n):
    return lambda g, shape: torch.randint(n, shape[:1], generator=g)


def counted(own, labels):
    """What the model's own mean is over."""
    if isinstance(own, str):
        return {"one": 1, "half": labels[0].numel() / 2, "all": labels[0].numel()}[own]
    return int((labels[:, own:] != -100).sum())


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


def assert_near(found, expected, near=1e-9):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        largest = value.abs().max()
        assert (found[name] - value).abs().max() <= near * largest + 1e-25, name


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
