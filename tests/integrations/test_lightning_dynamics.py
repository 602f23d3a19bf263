"""Dynamics in trainers of both packages, against plain loops."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset

pytest.importorskip("lightning.pytorch")
pytest.importorskip("pytorch_lightning")
import lightning.pytorch as lightning
from lightning_recording import Named, assert_nothing_left, assert_scores, fit, loader_of, plain
from lightning_runs import PACKAGES, adam, assert_same, module_of, network, samples, trainer_of

from gradmask.audit import Dynamics, Indexed
from gradmask.errors import StateError
from gradmask.integrations.lightning import DynamicsCallback, FisherMaskCallback

pytestmark = pytest.mark.usefixtures("repeatable", "own_environment")


def still():
    """A network that draws nothing, as validation does when its loader begins."""
    net = network()
    net[3].p = 0.0
    return net


@pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES)
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"val_check_interval": 2}],
    ids=str,
)
@pytest.mark.parametrize("model", [None, "net"])
def test_equals_a_plain_loop(package, options, model):
    """With validation between the steps, which does not count; the weights are the same, too."""
    dynamics = DynamicsCallback(model=model)
    val = loader_of(samples(), indexed=False) if "val_check_interval" in options else None
    make = network if val is None else still
    given = {"val": val, "package": package, **options}
    module, trainer = fit(
        dynamics, loader_of(samples()), module=module_of(package, make()), **given
    )
    accumulate, cast = options.get("accumulate_grad_batches", 1), "precision" in options
    expected, weights = plain(accumulate=accumulate, cast=cast, make=make)
    assert_scores(dynamics.dynamics, expected)
    assert (dynamics.scores()["visits"] == 4).all()
    assert_same(module.net.state_dict(), weights)
    without = module_of(package, make())
    fit(None, loader_of(samples(), indexed=False), module=without, **given)
    assert_same(module.net.state_dict(), without.net.state_dict())
    assert_nothing_left(module, trainer)


class Steps(lightning.LightningModule):
    """Takes batches of one form, here and in the hooks before."""

    def __init__(self, form, forms):
        super().__init__()
        self.net, self.form, self.forms = network(), form, forms

    def on_before_batch_transfer(self, batch, _):
        self.forms.append(sorted(batch) if isinstance(batch, dict) else (type(batch), len(batch)))
        return batch

    def validation_step(self, batch, _):
        self.net(batch["x"] if isinstance(batch, dict) else batch[0])

    def training_step(self, batch, _):
        if isinstance(batch, dict):
            inputs, labels = batch["x"], batch[self.form]
        else:
            inputs, labels = batch
        with torch.no_grad():
            self.net(inputs[:2])  # of no batch
            self.net.eval()(inputs)
        logits = self.net.train()(inputs)
        self.net(inputs + 1)  # another view of the same samples
        return functional.cross_entropy(logits, labels)

    configure_optimizers = adam


def as_tuple(rows):
    return tuple(torch.utils.data.default_collate(rows))


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("labels", {}),
        ("y", {}),
        ("odd", {"unpack": lambda batch: (batch["x"], batch["odd"])}),
        (tuple, {}),
        (list, {}),
    ],
)
def test_batches_of_every_form(form, options):
    """The first call of a step in training counts, and no hook sees the numbers."""
    data = Named(form) if isinstance(form, str) else samples()
    collate = {"collate_fn": as_tuple} if form is tuple else {}
    forms, expected = [], Dynamics(40)
    module = Steps(form, forms)
    seen = []
    module.net.register_forward_hook(
        lambda net, _, out: seen.append(out) if net.training and out.requires_grad else None
    )
    dynamics = DynamicsCallback(model="net", **options)
    loader = loader_of(data, **collate)
    fit(dynamics, loader, module=module, val=loader_of(data, indexed=False), max_epochs=2)
    whole = sorted(["x", form]) if isinstance(form, str) else (form, 2)
    assert set(map(str, forms)) <= {str(whole), str((list, 2))}  # validation has lists
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for i, batch in enumerate(loader):
            named = isinstance(batch, dict)
            labels, ids = (batch[form], batch["sample_id"]) if named else batch[1:]
            expected.update(ids, seen[10 * epoch + 2 * i], labels)
    assert_scores(dynamics.dynamics, expected)


def test_part_of_the_samples():
    """Numbers are those of the whole data set."""
    dynamics = DynamicsCallback()
    fit(dynamics, DataLoader(Subset(Indexed(samples()), range(10, 30)), 8), max_epochs=1)
    visits = dynamics.scores()["visits"]
    assert visits.tolist() == [0] * 10 + [1] * 20 + [0] * 10


class Language(lightning.LightningModule):
    """A language model of Hugging Face's."""

    def __init__(self):
        super().__init__()
        hosts = pytest.importorskip("hosts")
        pytest.importorskip("transformers")
        self.model = hosts.gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)

    def training_step(self, batch, _):
        return self.model(**batch).loss

    configure_optimizers = adam


def test_a_language_model():
    ids = torch.randint(1, 37, (8, 5))
    data = [{"input_ids": row, "labels": row} for row in ids]
    module, dynamics = Language(), DynamicsCallback(model="model", positions=4)
    logits = module.model(ids).logits.detach()
    fit(dynamics, DataLoader(Indexed(data), 4), module=module, max_steps=2, max_epochs=1)
    expected = Dynamics(8, positions=4)
    expected.update(torch.arange(4), logits[:4, :-1], ids[:4, 1:])
    found = dynamics.scores()["area_under_margin"]
    assert torch.allclose(found[:4], expected.scores()["area_under_margin"][:4], atol=1e-5)
    assert (dynamics.scores()["visits"] == 1).all()


# Checkpoints


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES)
def test_a_resumed_run_is_one_that_went_on(package, validate, tmp_path):
    def run(ckpt_path=None, **options):
        module, dynamics = module_of(package, still()), DynamicsCallback(**options)
        save = package.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
        trainer = trainer_of(package, save, dynamics, enable_checkpointing=True)
        validation = DataLoader(samples(4), 2) if validate else None
        loader = loader_of(samples())
        trainer.fit(module, loader, validation, ckpt_path=ckpt_path, weights_only=True)
        return module.net.state_dict(), dynamics

    weights, whole = run()
    again, going = run(tmp_path / "epoch=1.ckpt")
    assert_same(again, weights)
    assert_scores(going.dynamics, whole.dynamics)
    assert (going.scores()["visits"] == 4).all()
    state = whole.dynamics.state_dict()
    for name, value in going.dynamics.state_dict().items():
        assert value == state[name] if not torch.is_tensor(value) else value.equal(state[name])
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"][
        "DynamicsCallback"
    ]
    assert saved["dynamics"]["counts"][:-1, 0].tolist() == [2] * 40
    with pytest.raises(StateError, match="'positions': None"):
        run(tmp_path / "epoch=1.ckpt", positions=2)


def test_a_state_that_is_saved_again_before_training(tmp_path):
    module, trainer = fit(DynamicsCallback(), loader_of(samples()), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    dynamics = DynamicsCallback()
    later = trainer_of(lightning, dynamics)
    later.validate(
        module, loader_of(samples(), indexed=False), ckpt_path=tmp_path / "last.ckpt", verbose=False
    )
    assert dynamics.state_dict()["dynamics"]["counts"][:-1, 0].tolist() == [1] * 40


def test_several_fits_are_one():
    dynamics, module = DynamicsCallback(), module_of(lightning)
    fit(dynamics, loader_of(samples()), module=module, max_epochs=1)
    fit(dynamics, loader_of(samples()), module=module, max_epochs=2)
    assert (dynamics.scores()["visits"] == 3).all()
    fit(dynamics, loader_of(samples()), max_epochs=1)  # another module
    assert (dynamics.scores()["visits"] == 1).all()


@pytest.mark.parametrize("refresh", ["epoch", "start", 3, "online"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_together_with_a_mask(refresh, first, own):
    if own and refresh == "online":
        pytest.skip("online reads no data")
    data = loader_of(samples(), indexed=False) if own else None
    masks = [FisherMaskCallback(0.3, refresh=refresh, data=data) for _ in range(2)]
    state = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    nets = copy.deepcopy(state), copy.deepcopy(state)
    alone = module_of(lightning, nets[0])
    fit(masks[0], loader_of(samples(), indexed=False), module=alone)
    dynamics = DynamicsCallback()
    pair = (masks[1], dynamics) if first else (dynamics, masks[1])
    module = module_of(lightning, nets[1])
    _, trainer = fit(pair[1], loader_of(samples()), module=module, more=pair[:1])
    assert masks[1].mask.refreshes
    assert_same(module.net.state_dict(), alone.net.state_dict())
    assert (dynamics.scores()["visits"] == 4).all()
    assert_nothing_left(module, trainer)
