"""Small models of Hugging Face's, made from configurations, and batches as their collators give."""

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
