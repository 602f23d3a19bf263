"""Several processes: every rank measures its own part of the data, and all have the same mask.

torchrun --nproc-per-node 2 examples/ddp_torchrun.py
"""

import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import gradmask

on_gpu = torch.cuda.is_available()
device = f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu"
dist.init_process_group("nccl" if on_gpu else "gloo")
torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
train = TensorDataset(images[:1400], labels[:1400])
sampler = DistributedSampler(train)
loader = DataLoader(train, batch_size=16, sampler=sampler)

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
model = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
mask = gradmask.FisherMask(model, keep=0.25).attach(optimizer)  # the wrapped model

for epoch in range(5):
    sampler.set_epoch(epoch)
    for inputs, targets in loader:
        optimizer.zero_grad()
        cross_entropy(model(inputs.to(device)), targets.to(device)).backward()
        optimizer.step()
    mask.refresh(loader)  # on every rank

    with torch.no_grad():
        found = model.module(images[1400:].to(device)).argmax(1).cpu()
    accuracy = (found == labels[1400:]).double().mean()
    if dist.get_rank() == 0:
        print(f"epoch {epoch}: accuracy {accuracy:.3f}, {mask.kept_fraction:.0%} will learn")
dist.destroy_process_group()
