"""The callback in trainers of both packages, against plain loops with the same masks."""

import copy
import importlib
import os
import random
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_runs import (
    PACKAGES,
    FisherMaskCallback,
    Noisy,
    Pair,
    adam,
    assert_same,
    fitted,
    lightning,
    module_of,
    network,
    pytorch_lightning,
    samples,
    shuffled,
    trainer_of,
)
from processes import run_processes
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from gradmask import FisherMask, fisher_diagonal
from gradmask.errors import (
    GradmaskWarning,
    StateError,
)

pytestmark = pytest.mark.usefixtures("repeatable", "own_environment")


def plain(refresh, *, epochs=4, accumulate=1, clip=None, cast=None, net=None, **options):
    """The same in a loop of one's own."""
    model = net or network()
    optimizer = adam(model)
    dtype = next(model.parameters()).dtype
    options["unpack"] = lambda batch: (batch[0].to(dtype), batch[1])
    mask = FisherMask(model, **options).attach(optimizer)
    loader, done = shuffled(), 0
    torch.manual_seed(2)
    if refresh == "start":
        mask.refresh(loader)
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        if refresh == "epoch" and epoch:
            mask.refresh(loader)
        for i, (inputs, labels) in enumerate(loader):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast is not None):
                loss = functional.cross_entropy(model(inputs.to(dtype)), labels)
            if i % accumulate == 0:
                optimizer.zero_grad()
            (loss / accumulate).backward()
            if (i + 1) % accumulate and i + 1 < len(loader):
                continue
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            done += 1
            if isinstance(refresh, int) and done % refresh == 0:
                mask.refresh(loader)
    return model.state_dict()


@pytest.mark.parametrize("scope", ["gradient", "update"])
@pytest.mark.parametrize("refresh", ["epoch", "start", 3])
@pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES)
def test_equals_a_plain_loop(package, refresh, scope):
    callback = FisherMaskCallback(0.3, refresh=refresh, scope=scope)
    ours = fitted(package, callback)
    assert_same(ours, plain(refresh, keep=0.3, scope=scope))
    assert callback.steps == 20
    assert callback.mask.refreshes == {"epoch": 3, "start": 1, 3: 6}[refresh]
    assert callback.mask.masks.keys() == {f"net.{name}" for name, _ in network().named_parameters()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_accumulation_clipping_and_precision(precision):
    net = network().double() if precision == "64-true" else None
    cast = torch.bfloat16 if precision == "bf16-mixed" else None
    expected = plain(2, accumulate=2, clip=0.05, cast=cast, net=net, keep=0.3)
    callback = FisherMaskCallback(0.3, refresh=2)
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "precision": precision}
    assert_same(fitted(callback=callback, **options), expected)
    assert callback.steps == 12


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("refresh", ["epoch", "start", 2])
def test_a_mask_that_keeps_all_changes_nothing(refresh, accumulate):
    def run(*callback):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        loader = DataLoader(Noisy(*samples().tensors), 8, shuffle=True)
        return fitted(lightning, *callback, loader=loader, accumulate_grad_batches=accumulate)

    callback = FisherMaskCallback(1.0, refresh=refresh, max_samples=None)
    assert_same(run(callback), run())
    assert callback.mask.refreshes


# Several optimizers


def test_two_networks_with_optimizers_of_their_own():
    callbacks = [
        FisherMaskCallback(0.3, model="first", refresh=4, scope="update"),
        FisherMaskCallback(0.5, model="second", refresh="start", scope="update"),
    ]
    module = Pair()
    before = copy.deepcopy(module)
    trainer = trainer_of(lightning, *callbacks, max_epochs=1)
    trainer.fit(module, shuffled())
    first, second = callbacks
    assert (first.steps, second.steps) == (5, 3)
    assert (first.mask.refreshes, second.mask.refreshes) == (1, 1)
    moved = {n: p != before.second.get_parameter(n) for n, p in module.second.named_parameters()}
    assert all((moved[n] <= m).all() for n, m in second.mask.masks.items())
    assert first.mask.masks.keys() == dict(module.first.named_parameters()).keys()
    states = {c.state_key: c.state_dict() for c in callbacks}
    assert len(states) == 2
    kept = {k: float(v) for k, v in trainer.callback_metrics.items()}
    assert kept == {
        "fisher_mask/kept/first": pytest.approx(first.mask.kept_fraction),
        "fisher_mask/kept/second": pytest.approx(second.mask.kept_fraction),
    }


def test_the_whole_module_with_two_optimizers():
    class Whole(Pair):
        def forward(self, inputs):
            return self.first(inputs) + self.second(inputs)

    callback = FisherMaskCallback(0.3, refresh=3)
    trainer_of(lightning, callback, max_epochs=1).fit(Whole(), shuffled())
    assert callback.steps == 8
    assert callback.mask.refreshes == 2


# Going on


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("refresh", ["epoch", 3])
@pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES)
def test_a_resumed_run_equals_one_that_went_on(package, refresh, validate, tmp_path):
    def run(ckpt_path=None):
        net = network()
        net[3] = nn.Identity()  # Lightning does not save the random state of dropout
        module = module_of(package, net)
        callback = FisherMaskCallback(0.3, refresh=refresh, scope="update")
        save = package.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
        options = {"enable_checkpointing": True, "num_sanity_val_steps": 2}
        trainer = trainer_of(package, save, callback, **options)
        validation = DataLoader(samples(4), 2) if validate else None
        trainer.fit(module, shuffled(), validation, ckpt_path=ckpt_path, weights_only=True)
        return module.net.state_dict(), callback

    whole, first = run()
    ours, second = run(tmp_path / "epoch=1.ckpt")
    assert_same(ours, whole)
    assert_same(second.mask.masks, first.mask.masks)
    assert (second.steps, second.mask.refreshes) == (first.steps, first.mask.refreshes)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"]
    assert saved[first.state_key]["steps"] == 10


def test_a_state_of_other_options(tmp_path):
    trainer = trainer_of(lightning, FisherMaskCallback(0.3, refresh=1), max_steps=2)
    trainer.fit(module_of(lightning), shuffled())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = trainer_of(lightning, FisherMaskCallback(0.4, refresh=1), max_steps=4)
    with pytest.raises(StateError, match=r"keep=0\.3"):
        other.fit(module_of(lightning), shuffled(), ckpt_path=tmp_path / "last.ckpt")


def test_a_state_that_is_saved_again_before_training(tmp_path):
    trainer = trainer_of(lightning, FisherMaskCallback(0.3, refresh=1), max_steps=2)
    module = module_of(lightning)
    trainer.fit(module, shuffled())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    callback = FisherMaskCallback(0.3, refresh=1)
    later = trainer_of(lightning, callback)
    later.validate(module, shuffled(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert callback.state_dict()["steps"] == 2
    assert callback.state_dict()["mask"]["refreshes"] == 2


def test_several_fits_are_one():
    callback = FisherMaskCallback(0.3)
    module, loader = module_of(lightning), shuffled()
    torch.manual_seed(2)
    trainer = trainer_of(lightning, callback, max_epochs=2)
    trainer.fit(module, loader)
    assert not any(o._optimizer_step_pre_hooks for o in trainer.optimizers)
    trainer.fit_loop.max_epochs = trainer.fit_loop.max_epochs + 2
    trainer.fit(module, loader)
    assert callback.steps == 20
    assert callback.mask.refreshes == 3
    fresh = trainer_of(lightning, callback, max_epochs=2)
    fresh.fit(module_of(lightning), loader)
    assert (callback.steps, callback.mask.refreshes) == (10, 1)


# What is measured


def test_data_and_unpack():
    data = [{"features": x, "class": y} for x, y in DataLoader(samples(), 7)]
    seen = []

    def unpack(batch):
        seen.append(batch)
        return batch["features"], batch["class"]

    net = network()
    expected = fisher_diagonal(net, DataLoader(samples(), 7))
    callback = FisherMaskCallback(0.3, refresh="start", data=data, model="net", unpack=unpack)
    fitted(callback=callback, net=net, max_steps=1)
    mask = FisherMask(net, 0.3)
    mask.update(expected)
    assert_same(callback.mask.masks, mask.masks)
    assert len(seen) >= len(data)


def test_batches_are_prepared_as_for_a_training_step():
    class Prepared(lightning.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(samples(), 8)

        def on_before_batch_transfer(self, batch, _):
            return batch[0] + 1, batch[1]

        def on_after_batch_transfer(self, batch, _):
            assert self.trainer.training
            return 3 * batch[0], batch[1]

    net, module = network(), module_of(lightning)
    prepared = [(3 * (x + 1), y) for x, y in DataLoader(samples(), 8)]
    mask = FisherMask(net, 0.3)
    mask.update(fisher_diagonal(net, prepared))
    callback = FisherMaskCallback(0.3, refresh="start", model="net")
    trainer_of(lightning, callback, max_steps=1).fit(module, datamodule=Prepared())
    assert_same(callback.mask.masks, mask.masks)


def test_what_forward_logs_is_logged_in_training_only():
    logged = []

    class Logging(type(module_of(lightning))):
        def forward(self, inputs):
            self.log("size", float(len(inputs)), on_step=True, on_epoch=True, reduce_fx="sum")
            logged.append(len(inputs))
            return super().forward(inputs)

    module = Logging()
    callback = FisherMaskCallback(0.3, refresh=2)
    trainer = trainer_of(lightning, callback, max_epochs=1)
    trainer.fit(module, shuffled())
    assert float(trainer.callback_metrics["size_epoch"]) == 40
    assert sum(logged) > 40
    assert module.trainer is trainer
    kept = float(trainer.callback_metrics["fisher_mask/kept"])
    assert kept == pytest.approx(callback.mask.kept_fraction)
    assert kept == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_autoencoder_of_the_documentation(package):
    """As it is shown, but for the package and what is printed and saved."""
    text = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    (shown,) = (b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "AutoEncoder" in b)
    shown = shown.replace("import lightning as L", f"import {package} as L")
    made, _, run = shown.partition("trainer = ")
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, 1, 28, 28, generator=generator)
    loader = DataLoader(TensorDataset(images, torch.zeros(20, dtype=torch.int64)), 5)
    names = {"loader": loader, "__name__": __name__}
    exec(made, names)
    quiet = "logger=False, enable_checkpointing=False, accelerator='cpu', max_epochs=2"
    exec("trainer = " + run.replace("max_epochs=10", quiet), names)
    trainer = names["trainer"]
    (callback,) = (c for c in trainer.callbacks if isinstance(c, FisherMaskCallback))
    assert (callback.steps, callback.mask.refreshes) == (8, 1)
    assert callback.mask.kept_fraction == pytest.approx(0.25, abs=0.01)
    # What is measured are the squared gradients of each image's own error.
    model = trainer.lightning_module
    ours = fisher_diagonal(model, loader, loss="mse", unpack=names["images"])
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for image in images.flatten(1):
        loss = model.training_step((image[None], None), 0) * 28 * 28 / 2
        found = torch.autograd.grad(loss, list(model.parameters()))
        for total, gradient in zip(expected.values(), found, strict=True):
            total += gradient**2 / len(images)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-9)


# Refusals and warnings


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_one_package_is_enough(package, monkeypatch):
    name = "gradmask.integrations.lightning"
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, name)
    other = importlib.import_module(name).FisherMaskCallback
    left = {"lightning.pytorch": pytorch_lightning, "pytorch_lightning": lightning}
    assert issubclass(other, left[package].Callback)
    for absent in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, absent, None)
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install 'gradmask\[lightning\]'"):
        importlib.import_module(name)


# Several processes


def fit_on_ranks(rank, world, folder):
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK"):
        os.environ[name] = str(rank if name != "GROUP_RANK" else 0)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(world)
    os.environ["TORCHELASTIC_RUN_ID"] = "one"  # the group is there already; Lightning takes it on
    warnings.simplefilter("error", GradmaskWarning)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    net.load_state_dict(torch.load(folder / "net.pt"))
    callback = FisherMaskCallback(0.3, refresh=2, model="net", kind="exact")
    options = {"devices": world, "strategy": "ddp", "max_epochs": 2, "precision": "64-true"}
    module = module_of(lightning, net)
    trainer = trainer_of(lightning, callback, **options)
    trainer.fit(module, DataLoader(samples(), 8, shuffle=True))
    assert isinstance(trainer.strategy, lightning.strategies.DDPStrategy)
    assert trainer.world_size == 2
    assert type(trainer.train_dataloader.sampler).__name__ == "DistributedSampler"
    assert (callback.steps, callback.mask.refreshes) == (6, 3)
    torch.save({"masks": callback.mask.masks, "weights": net.state_dict()}, folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes(tmp_path):
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    run_processes(fit_on_ranks, 2, tmp_path, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same(first["masks"], second["masks"])
    assert_same(first["weights"], second["weights"])
    # The last mask is that of all samples, whichever rank read them.
    net.load_state_dict(first["weights"])
    mask = FisherMask(net, 0.3, kind="exact", unpack=lambda batch: (batch[0].double(), batch[1]))
    mask.refresh(DataLoader(samples(), 8))
    assert_same(first["masks"], mask.masks)


def test_ddp_on_one_process(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "0")
    callback = FisherMaskCallback(0.3, refresh=3)
    options = {"strategy": "ddp", "use_distributed_sampler": False}
    try:
        ours = fitted(callback=callback, **options)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert_same(ours, plain(3, keep=0.3))


@pytest.mark.parametrize("options", [{"score": "ratio"}, {"which": "lowest"}])
def test_protected_data_are_those_of_the_mask(options):
    old = DataLoader(samples(12), 4)
    options = {"max_samples": None, **options}
    callback = FisherMaskCallback(0.3, refresh="start", protect=old, model="net", **options)
    fitted(callback=callback, max_epochs=1)
    mask = FisherMask(network(), 0.3, **options)
    mask.refresh(shuffled(), protect=old)
    for name, expected in mask.masks.items():
        assert torch.equal(callback.mask.masks[name], expected), name
