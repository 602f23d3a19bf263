"""Adapters of PEFT: only what is trained counts, and sparse ones by any score."""

import pytest
import torch

pytest.importorskip("peft")
import peft
from hosts import assert_near, bert, classes, gpt2, language_batches, own_loss, with_labels

from gradmask import FisherMask, fisher_diagonal
from gradmask.errors import DataError, ModelError, OptionError
from gradmask.integrations.peft import shira_mask

ADAPTERS = {
    "lora": (peft.LoraConfig, {"r": 2, "target_modules": ["query", "dense"]}),
    "dora": (peft.LoraConfig, {"r": 2, "target_modules": ["query"], "use_dora": True}),
    "ia3": (
        peft.IA3Config,
        {"target_modules": ["key", "dense"], "feedforward_modules": ["dense"]},
    ),
    "prefix": (peft.PrefixTuningConfig, {"num_virtual_tokens": 3}),
    "prompt": (peft.PromptTuningConfig, {"num_virtual_tokens": 3}),
    "shira": (peft.ShiraConfig, {"r": 1, "target_modules": ["query", "value"]}),
}
GPT2 = {"lora": ["c_attn"], "dora": ["c_attn"], "ia3": ["c_attn", "mlp.c_proj"]}


def adapted(adapter, causal, **options):
    torch.manual_seed(0)
    kind, own = ADAPTERS[adapter]
    own = own | options | {"task_type": "CAUSAL_LM" if causal else "SEQ_CLS"}
    if causal and adapter in GPT2:
        own |= {"target_modules": GPT2[adapter]}
        own |= {"feedforward_modules": ["mlp.c_proj"]} if adapter == "ia3" else {}
    base = gpt2() if causal else bert("SequenceClassification", num_labels=3)
    model = peft.get_peft_model(base.double(), kind(**own)).double()
    with torch.no_grad():
        for p in model.parameters():  # some adapters begin as nothing
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("causal", [False, True], ids=["bert", "gpt2"])
@pytest.mark.parametrize("adapter", [a for a in ADAPTERS if a != "shira"])
def test_only_what_is_trained_counts(adapter, causal):
    if adapter == "prefix" and not causal:
        pytest.skip("PEFT takes no prefixes for an encoder of this version of Transformers.")
    model = adapted(adapter, causal)
    data = language_batches() if causal else with_labels(classes(3))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total, count = {name: torch.zeros_like(p) for name, p in named.items()}, 0
    model.eval()
    for batch in data:
        for n in range(len(batch["labels"])):
            row = {k: v[n : n + 1] for k, v in batch.items()}
            if causal and adapter == "prompt":  # whose logits are more than the labels
                outputs = model(**row)
                logits = outputs.logits[:, 2:-1].mT  # the last virtual token tells the first
                scored = torch.nn.functional.cross_entropy(logits, row["labels"], reduction="sum")
            else:
                scored = own_loss(model, row, 1 if causal else "one")
            gradients = torch.autograd.grad(scored, list(named.values()), allow_unused=True)
            for name, g in zip(named, gradients, strict=True):
                total[name] += 0 if g is None else g**2
            count += 1
    found = fisher_diagonal(model, data)
    assert_near(found, {name: value / count for name, value in total.items()})
    assert any(value.any() for value in found.values())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_mask_on_an_adapter():
    model = adapted("lora", causal=False)
    data = with_labels(classes(3))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    mask = FisherMask(model, keep=0.3, scope="update").attach(optimizer)
    mask.refresh(data)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for batch in data * 3:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    for name, p in model.named_parameters():
        moved = p.detach() != before[name]
        learns = mask.masks[name] if p.requires_grad else torch.zeros_like(moved)
        assert not (moved & ~learns).any(), name
        assert moved.any() == learns.any(), name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_shira_by_score():
    torch.manual_seed(0)
    base, data = bert("SequenceClassification", num_labels=3), with_labels(classes(3))
    fisher = fisher_diagonal(base, data)
    names = {id(p): name for name, p in base.named_parameters()}
    config = peft.ShiraConfig(r=2, target_modules=["query", "value"], mask_type="fisher")
    config.mask_fn = shira_mask(base, fisher)
    model = peft.get_peft_model(base, config)
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.shira.layer.Linear)]
    assert len(layers) == 4
    for layer in layers:
        score = fisher[names[id(layer.base_layer.weight)]]
        rows, columns = layer.shira_indices["default"].long()
        chosen = torch.zeros_like(score, dtype=torch.bool)
        chosen[rows, columns] = True
        assert chosen.sum() == 2 * sum(score.shape)
        assert score[chosen].min() >= score[~chosen].max()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert set(fisher_diagonal(model, data)) == set(trained)  # and it can be measured again


def test_shira_errors():
    base = bert("SequenceClassification", num_labels=3)
    weight = base.bert.encoder.layer[0].attention.self.query
    name = "bert.encoder.layer.0.attention.self.query.weight"
    scores = {name: torch.rand(16, 16)}
    assert shira_mask(base, scores)(weight, 2).sum() == 64
    with pytest.raises(OptionError, match="r=9 asks for 288 entries"):
        shira_mask(base, scores)(weight, 9)
    with pytest.raises(ModelError, match=r"no score for the weight .* \(bert.encoder.layer.1"):
        shira_mask(base, scores)(base.bert.encoder.layer[1].attention.self.query, 2)
    with pytest.raises(ModelError, match="no score"):
        shira_mask(base, scores)(torch.nn.Linear(3, 3), 1)
    with pytest.raises(DataError, match="has shape"):
        shira_mask(base, {name: torch.rand(3, 3)})
    with pytest.raises(DataError, match="NaN"):
        shira_mask(base, {name: torch.full((16, 16), torch.nan)})
