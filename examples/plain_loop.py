"""A PyTorch loop with the mask: the three marked lines are all there is to add.

python examples/plain_loop.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import gradmask  # 1

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
loader = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=32, shuffle=True)

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
mask = gradmask.FisherMask(model, keep=0.25).attach(optimizer)  # 2

for epoch in range(5):
    for inputs, targets in loader:
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    mask.refresh(loader)  # 3: the mask of the next epoch

    with torch.no_grad():
        accuracy = (model(images[1400:]).argmax(1) == labels[1400:]).double().mean()
    print(f"epoch {epoch}: accuracy {accuracy:.3f}, {mask.kept_fraction:.0%} will learn")
