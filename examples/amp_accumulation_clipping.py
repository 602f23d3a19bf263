"""Mixed precision, gradient accumulation and clipping beside the mask; the loop stays as it is.

python examples/amp_accumulation_clipping.py

Clipping sees whole gradients, and the step masks what is left. To clip what will be applied,
call `mask.apply_()` before. A step that the scaler skips leaves mask and weights as they were.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import gradmask

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.bfloat16
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
loader = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=16, shuffle=True)

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
mask = gradmask.FisherMask(model, keep=0.25, scope="update").attach(optimizer)

accumulate = 2
for epoch in range(5):
    for i, (inputs, targets) in enumerate(loader, start=1):
        with torch.autocast(device, dtype=dtype):
            loss = cross_entropy(model(inputs.to(device)), targets.to(device))
        scaler.scale(loss / accumulate).backward()
        if i % accumulate == 0:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    mask.refresh(loader)  # outside autocast: the weights are float32, and measured in it

    with torch.no_grad():
        found = model(images[1400:].to(device)).argmax(1).cpu()
    accuracy = (found == labels[1400:]).double().mean()
    print(f"epoch {epoch}: accuracy {accuracy:.3f}, {mask.kept_fraction:.0%} will learn")
