"""Training functions that the tests of studies share; importable by workers."""

import os
import signal
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

EPOCHS = 5


def data(seed, count=96):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=generator)
    labels = (inputs[:, 0] > 0).long()
    labels[: count // 4] = 1 - labels[: count // 4]
    return inputs, labels


def build(seed, lr=0.2):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    inputs, labels = data(seed)
    loader = DataLoader(TensorDataset(inputs[:48], labels[:48]), 12)
    return model, optimizer, loader, {"val": slice(48, 72), "test": slice(72, 96)}


def train(trial, before_epoch=lambda trial, epoch: None):
    model, optimizer, loader, parts = build(trial.seed, trial.options.get("lr", 0.2))
    mask = trial.mask(model, optimizer, max_samples=24)
    inputs, labels = data(trial.seed)
    for epoch in range(trial.resume(model=model, optimizer=optimizer, mask=mask), EPOCHS):
        before_epoch(trial, epoch)
        model.train()
        for batch, targets in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), targets).backward()
            optimizer.step()
        model.eval()
        row = {}
        with torch.no_grad():
            for name, part in parts.items():
                logits = model(inputs[part])
                row[f"{name}_loss"] = nn.functional.cross_entropy(logits, labels[part])
                row[f"{name}_accuracy"] = (logits.argmax(1) == labels[part]).float().mean()
        trial.report(epoch=epoch, **row)
        mask.refresh(loader)
        trial.save(model=model, optimizer=optimizer, mask=mask)


def train_slowly(trial):
    train(trial, before_epoch=lambda *_: time.sleep(0.3))


def train_and_die(trial):
    """A worker that dies once, in the third epoch of one run."""
    died = trial.directory / "died"

    def die(trial, epoch):
        if epoch == 3 and trial.arm.masks and trial.seed == 0 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    train(trial, before_epoch=die)


def own_arm(trial, model, optimizer, **options):
    """An arm of the user's own: smaller steps, and no mask."""
    for group in optimizer.param_groups:
        group["lr"] *= trial.arm.options.get("factor", 0.5)


def report_nothing(trial):
    pass


def diverge(trial):
    for epoch in range(3):
        loss = float("nan") if epoch == 2 and trial.seed == 1 else 1.0
        trial.report(epoch=epoch, val_accuracy=0.5, test_accuracy=0.5, test_loss=loss)
