"""Modules and trainers of both packages of Lightning."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

lightning = pytest.importorskip("lightning.pytorch")

pytorch_lightning = pytest.importorskip("pytorch_lightning")

PACKAGES = {"lightning": lightning, "pytorch_lightning": pytorch_lightning}


def network():
    torch.manual_seed(1)
    layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)
    return nn.Sequential(*layers)


def samples(n=40):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (n,), generator=generator)
    return TensorDataset(torch.randn(n, 6, generator=generator), labels)


def shuffled():
    """In an order that every epoch has by its number, so that a run may go on."""
    data = samples()
    return DataLoader(data, 8, sampler=DistributedSampler(data, num_replicas=1, rank=0))


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def module_of(package, net=None):
    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net or network()

        def forward(self, inputs):
            return self.net(inputs)

        def training_step(self, batch, _):
            inputs, labels = batch
            return functional.cross_entropy(self(inputs), labels)

        def validation_step(self, batch, _):
            """Nothing: what matters is when it runs."""

        def configure_optimizers(self):
            return adam(self)

    return Module()


def trainer_of(package, *callbacks, **options):
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    defaults = {**dict.fromkeys(quiet, False), "accelerator": "cpu", "devices": 1, "max_epochs": 4}
    return package.Trainer(callbacks=list(callbacks), **defaults | options)


def fitted(package=lightning, callback=None, loader=None, net=None, **options):
    """The weights after training with the callback."""
    module = module_of(package, net)
    torch.manual_seed(2)
    trainer = trainer_of(package, *[callback] if callback else [], **options)
    trainer.fit(module, loader or shuffled())
    return module.net.state_dict()


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


class Noisy(TensorDataset):
    """Samples with noise from everybody's random states."""

    def __getitem__(self, i):
        inputs, label = super().__getitem__(i)
        noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
        return inputs + noise, label


class Pair(lightning.LightningModule):
    """Two networks that take turns, each with its own optimizer, in manual optimization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = network(), network()

    def training_step(self, batch, index):
        inputs, labels = batch
        for turn, (net, optimizer) in enumerate(
            zip((self.first, self.second), self.optimizers(), strict=True)
        ):
            if turn and index % 2:
                continue
            optimizer.zero_grad()
            self.manual_backward(functional.cross_entropy(net(inputs), labels))
            optimizer.step()

    def configure_optimizers(self):
        return adam(self.first), adam(self.second)


FisherMaskCallback = pytest.importorskip("gradmask.integrations.lightning").FisherMaskCallback
