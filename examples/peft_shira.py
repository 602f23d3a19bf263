"""Fine-tune the weights of a transformer that carry the most information, by PEFT's SHiRA."""

import torch
from peft import ShiraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

import gradmask
from gradmask.integrations.peft import shira_mask

torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
config = BertConfig(vocab_size=100, intermediate_size=64, num_labels=2, **sizes)
model = BertForSequenceClassification(config)

tokens = torch.randint(1, 100, (256, 16))
labels = (tokens == 7).any(1).long()  # whether a word occurs
samples = [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]
loader = DataLoader(samples, batch_size=32, shuffle=True)

fisher = gradmask.fisher_diagonal(model, loader)
adapter = ShiraConfig(r=4, target_modules=["query", "value", "dense"], mask_type="fisher")
adapter.mask_fn = shira_mask(model, fisher)
model = get_peft_model(model, adapter)
model.print_trainable_parameters()

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for epoch in range(3):
    for batch in loader:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}")
