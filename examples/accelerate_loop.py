"""A loop with Accelerate, its gradient accumulation and its checkpoints.

python examples/accelerate_loop.py                        # on what there is
accelerate launch examples/accelerate_loop.py             # as `accelerate config` says
python examples/accelerate_loop.py --checkpoint FOLDER    # goes on from it, if it is there
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import gradmask

parser = argparse.ArgumentParser()
parser.add_argument("--checkpoint", type=Path)
checkpoint = parser.parse_args().checkpoint

accelerator = Accelerator(gradient_accumulation_steps=2)
set_seed(0)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
loader = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=16, shuffle=True)

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
mask = gradmask.FisherMask(model, keep=0.25).attach(optimizer)  # both as prepared
accelerator.register_for_checkpointing(mask)
if checkpoint and checkpoint.exists():
    accelerator.load_state(checkpoint)

for epoch in range(mask.refreshes, 5):
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model(inputs), targets))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    mask.refresh(loader)  # the prepared loader, on every process
    if checkpoint:
        accelerator.save_state(checkpoint)

    with torch.no_grad():
        found = accelerator.unwrap_model(model)(images[1400:].to(accelerator.device)).argmax(1)
    accuracy = (found.cpu() == labels[1400:]).double().mean()
    accelerator.print(
        f"epoch {epoch}: accuracy {accuracy:.3f}, {mask.kept_fraction:.0%} will learn"
    )
accelerator.end_training()
