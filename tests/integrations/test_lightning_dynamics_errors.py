"""What dynamics cannot be recorded in Lightning, and two processes."""

import os
import warnings

import pytest
import torch

pytest.importorskip("lightning.pytorch")
pytest.importorskip("pytorch_lightning")
import lightning.pytorch as lightning
from lightning_recording import Named, assert_nothing_left, assert_scores, fit, loader_of, plain
from lightning_runs import adam, module_of, network, samples, trainer_of
from processes import run_processes
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from gradmask.audit import Dynamics, Indexed
from gradmask.errors import DataError, GradmaskWarning, ModelError, OptionError, StateError
from gradmask.integrations.lightning import DynamicsCallback

pytestmark = pytest.mark.usefixtures("repeatable", "own_environment")


class Quiet(lightning.LightningModule):
    """Has a forward that training_step does not call."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, _):
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    configure_optimizers = adam


class Reading(Quiet):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return functional.cross_entropy(self(batch[0]), batch[1])


class Without(Quiet):
    forward = lightning.LightningModule.forward


def compiled():
    return torch.compile(module_of(lightning), backend="eager")


def dropped(rows):
    return torch.utils.data.default_collate(
        [{"x": row["x"], "labels": row["labels"]} for row in rows]
    )


CASES = [
    (Quiet, {}, {}, ModelError, r"8 samples.*not called in training.*model=\.\.\."),
    (Without, {}, {}, ModelError, r"no forward.*DynamicsCallback\(model"),
    (Quiet, {"model": "nets"}, {}, ModelError, "no submodule 'nets': it has net"),
    (Reading, {}, {}, DataError, r"DataLoader\(Indexed.*training_step\(dataloader_iter\)"),
    (Quiet, {"model": "net"}, {"indexed": False}, DataError, r"Indexed data set.*Indexed\(data\)"),
    (Quiet, {"model": "net"}, {"data": Named("odd")}, DataError, r"names x, odd.*unpack=lambda"),
    (
        Quiet, {"model": "net"}, {"data": Named(), "collate_fn": dropped}, DataError,
        "no numbers of its samples.*'sample_id'",
    ),
    (compiled, {}, {}, ModelError, "inside a compiled module"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "options", "data", "error", "message"), CASES)
def test_what_cannot_be_recorded(make, options, data, error, message):
    """Told before the first optimizer step."""
    module, data = make(), dict(data)
    loader = loader_of(data.pop("data", samples()), **data)
    trainer = trainer_of(lightning, DynamicsCallback(**options))
    with pytest.raises(error, match=message):
        trainer.fit(module, loader)
    assert trainer.global_step == 0
    assert_nothing_left(module, trainer)


def test_what_is_told_at_once():
    with pytest.raises(OptionError, match="positions=0"):
        DynamicsCallback(positions=0)
    with pytest.raises(StateError, match=r"after trainer\.fit\(\)"):
        DynamicsCallback().scores()
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        fit(DynamicsCallback(), loader_of(samples()), more=[DynamicsCallback()])
    with pytest.raises(DataError, match=r"\(a list\) has no Indexed"):
        fit(DynamicsCallback(), [loader_of(samples()), loader_of(samples())])


def test_a_compiled_submodule():
    module = module_of(lightning, torch.compile(network(), backend="eager"))
    dynamics = DynamicsCallback(model="net")
    fit(dynamics, loader_of(samples()), module=module)
    assert_scores(dynamics.dynamics, plain()[0])


# Several processes


def fit_on_ranks(rank, world, folder):
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK"):
        os.environ[name] = str(rank if name != "GROUP_RANK" else 0)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(world)
    os.environ["TORCHELASTIC_RUN_ID"] = "one"  # the group is there already; Lightning takes it on
    warnings.simplefilter("error", GradmaskWarning)
    found = []
    module = module_of(lightning, nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    module.net.register_forward_hook(lambda *given: found.append(given[-1].detach()))
    dynamics = DynamicsCallback()
    options = {"devices": world, "strategy": "ddp", "max_epochs": 2, "enable_checkpointing": True}
    loader = DataLoader(Indexed(samples()), 8, shuffle=True)
    module.on_train_batch_start = lambda *_: None
    _, trainer = fit(dynamics, loader, module=module, default_root_dir=folder, **options)
    assert isinstance(trainer.strategy, lightning.strategies.DDPStrategy)
    ids, sampler = [], trainer.train_dataloader.sampler
    for epoch in range(2):
        sampler.set_epoch(epoch)
        ids += list(torch.tensor(list(sampler)).split(8))
    every = [None] * world
    torch.distributed.all_gather_object(every, list(zip(ids, found, strict=True)))
    alone = Dynamics(40, group=torch.distributed.new_group([rank]))
    for updates in zip(*every, strict=True):
        for places, logits in updates:
            alone.update(places, logits, samples().tensors[1][places])
    assert_scores(dynamics.dynamics, alone)
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert saved["callbacks"]["DynamicsCallback"]["dynamics"]["counts"][:-1, 0].tolist() == [2] * 40


@pytest.mark.slow
def test_two_processes(tmp_path):
    torch.manual_seed(0)
    run_processes(fit_on_ranks, 2, tmp_path, tmp_path)
