"""Training dynamics recorded in Lightning."""

import lightning.pytorch as lightning
import torch
from lightning_runs import adam, module_of, network, samples, trainer_of
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from gradmask.audit import Dynamics, Indexed


class Named(Dataset):
    """Samples that are mappings."""

    def __init__(self, label="labels"):
        self.data, self.label = samples(), label

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        inputs, label = self.data[i]
        return {"x": inputs, self.label: label}


def loader_of(data, indexed=True, **options):
    data = Indexed(data) if indexed else data
    return DataLoader(data, 8, sampler=DistributedSampler(data, num_replicas=1, rank=0), **options)


def plain(epochs=4, accumulate=1, cast=False, make=network):
    """The dynamics and weights of a loop of one's own."""
    model, data = make(), samples()
    optimizer, dynamics = adam(model), Dynamics(40)
    loader = loader_of(data)
    torch.manual_seed(2)
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for i, (inputs, labels, ids) in enumerate(loader):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
                logits = model(inputs)
                loss = functional.cross_entropy(logits, labels)
            dynamics.update(ids, logits, labels)
            if i % accumulate == 0:
                optimizer.zero_grad()
            (loss / accumulate).backward()
            if (i + 1) % accumulate == 0 or i + 1 == len(loader):
                optimizer.step()
    return dynamics, model.state_dict()


def assert_scores(found, expected):
    for name, value in expected.scores().items():
        assert torch.equal(found.scores()[name].nan_to_num(-9), value.nan_to_num(-9)), name
    for ours, theirs in zip(found.suggestions(), expected.suggestions(), strict=True):
        assert torch.equal(ours, theirs)


def fit(callback, loader, package=lightning, module=None, more=(), val=None, **options):
    module = module or module_of(package)
    torch.manual_seed(2)
    trainer = trainer_of(package, *more, *[callback] if callback else [], **options)
    trainer.fit(module, loader, val)
    return module, trainer


def assert_nothing_left(module, trainer):
    assert "convert_input" not in vars(trainer.precision_plugin)
    assert not any(part._forward_hooks for part in module.modules())
