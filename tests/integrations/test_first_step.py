"""A training whose loss is not what the mask measures is told of after its first step."""

import re
import warnings

import pytest
import torch
from lightning_runs import (
    PACKAGES,
    Pair,
    lightning,
    module_of,
    network,
    samples,
    shuffled,
    trainer_of,
)
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from gradmask.errors import DataError, GradmaskWarning, ModelError
from gradmask.integrations.lightning import FisherMaskCallback

pytestmark = pytest.mark.usefixtures("repeatable", "own_environment")


def module_with(loss_of, package=lightning, net=None):
    """A module whose `training_step` is `loss_of(module, inputs, labels)`."""

    class Module(type(module_of(package))):
        done = 0

        def training_step(self, batch, _):
            self.done += 1
            return loss_of(self, *batch)

    module = Module()
    module.net = net or module.net
    return module


def told(module, *, loader=None, strategy="auto", steps=4, callback=None, **options):
    """What a training warns of, by the callback."""
    callback = callback or FisherMaskCallback(0.3, refresh=2)
    trainer = trainer_of(lightning, callback, max_steps=steps, strategy=strategy, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader or shuffled())
    assert callback.mask.refreshes
    assert not any(m._forward_hooks for m in module.modules())
    return [str(w.message) for w in caught if issubclass(w.category, GradmaskWarning)]


def of_outputs(function, **options):
    return lambda module, inputs, labels: function(module(inputs), labels, **options)


cross_entropy = of_outputs(functional.cross_entropy)


def squares(module, inputs, _):
    return functional.mse_loss(module(inputs), inputs[:, :3])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_another_loss_than_the_one_measured(precision, accumulate):
    seen = []

    def loss(module, inputs, labels):
        outputs = module(inputs).double()
        value = functional.mse_loss(outputs, inputs[:, :3].double())
        seen.append((float(functional.cross_entropy(outputs, labels)), float(value)))
        return value

    options = {"precision": precision, "accumulate_grad_batches": accumulate}
    (message,) = told(module_with(loss), **options)
    pattern = r"that is (\S+) in the first batch, where training_step has (\S+): .*unpack="
    found = tuple(map(float, re.search(pattern, message).groups()))
    assert found == pytest.approx(seen[0], rel=0.01)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize(
    "loss",
    [
        cross_entropy,
        of_outputs(functional.cross_entropy, reduction="sum"),
        lambda module, inputs, labels: {"loss": cross_entropy(module, inputs, labels), "more": 1},
    ],
    ids=["mean", "sum", "dictionary"],
)
def test_the_loss_that_is_measured(loss, precision):
    assert not told(module_with(loss), precision=precision, accumulate_grad_batches=2)


@pytest.mark.parametrize("function", ["positions", "positions last", "soft", "ignored"])
def test_forms_of_targets(function):
    net = network()[:2]  # 8 outputs
    inputs, labels = samples().tensors
    targets = torch.stack([labels % 2, labels % 2], 1)
    if function == "positions":  # (N, 2 classes, 2 positions) ...
        shape, targets = (2, 4), torch.cat([targets, targets], 1)
    elif function == "positions last":
        shape = (2, 4)
    elif function == "soft":
        shape, targets = (8,), torch.rand(40, 8).softmax(1)
    else:
        shape, targets = (8,), labels.where(labels > 0, -100)
    net.append(nn.Unflatten(1, shape))

    def loss(module, inputs, targets):
        outputs = module(inputs)
        outputs = outputs.movedim(-1, 1) if function == "positions last" else outputs
        return functional.cross_entropy(outputs, targets)

    loader = DataLoader(TensorDataset(inputs, targets), 8)
    assert not told(module_with(loss, net=net), loader=loader)
    twice = module_with(lambda *given: 2.2 * loss(*given), net=net)
    assert len(told(twice, loader=loader)) == 1


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_a_forward_that_training_does_not_call(strategy, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "0")

    def inner(module, inputs, labels):
        return functional.cross_entropy(module.net(inputs), labels)

    try:
        (message,) = told(module_with(inner), strategy=strategy)
        assert "Module.forward, and training_step does not call it" in message
        assert not told(module_with(cross_entropy), strategy=strategy)
        callback = FisherMaskCallback(0.3, model="net", refresh=2)
        assert not told(module_with(inner), callback=callback, strategy=strategy)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_what_is_meant_is_not_compared():
    given = {"loss": "cross_entropy"}, {"strategy": "random"}
    for options in given:
        callback = FisherMaskCallback(0.3, refresh=2, **options)
        assert not told(module_with(squares), callback=callback)
    callback = FisherMaskCallback(0.3, refresh=2, model="first")
    assert not told(Pair(), callback=callback)  # in manual optimization


def test_unpack_says_what_the_targets_are():
    def loss(module, inputs, labels):
        return functional.cross_entropy(module(inputs), 2 - labels)

    def unpack(batch):
        torch.rand(3)  # changes nothing of training
        return batch[0], 2 - batch[1]

    assert len(told(module_with(loss))) == 1
    weights = []
    for keep in (1.0, 1.0):
        module = module_with(loss)
        callback = FisherMaskCallback(keep, refresh=2, unpack=unpack if not weights else None)
        torch.manual_seed(2)
        assert len(told(module, callback=callback)) == len(weights)
        weights.append(module.net.state_dict())
    assert all(torch.equal(w, weights[1][name]) for name, w in weights[0].items())
    # Of other data the batches may have another form.
    data = [{"inputs": x, "kinds": y} for x, y in DataLoader(samples(), 8)]
    entries = lambda batch: tuple(batch.values()) if isinstance(batch, dict) else batch  # noqa: E731
    options = {"data": data, "unpack": entries}
    assert not told(module_with(squares), callback=FisherMaskCallback(0.3, refresh=2, **options))


# What does not fit


@pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES)
@pytest.mark.parametrize("refresh", ["epoch", "start", 3])
def test_misfits_are_told_before_training(package, refresh):
    def loss(module, inputs, labels):
        return functional.cross_entropy(module(inputs.flatten(1)), labels)

    inputs, labels = samples().tensors
    module = module_with(loss, package)
    loader = DataLoader(TensorDataset(inputs.unflatten(1, (2, 3)), labels), 8)
    callback = FisherMaskCallback(0.3, refresh=refresh)
    message = r"runs Module\.forward on the batches of the training loader.*shapes.*unpack=lambda"
    with pytest.raises(ModelError, match=message):
        trainer_of(package, callback).fit(module, loader)
    assert not module.done
    # The mend that it names.
    flat = FisherMaskCallback(0.3, refresh=refresh, unpack=lambda b: (b[0].flatten(1), b[1]))
    trainer_of(package, flat, max_epochs=2).fit(module, loader)
    assert flat.mask.refreshes


def test_errors_of_others_stay_as_they_are():
    class Broken(TensorDataset):
        def __getitem__(self, i):
            raise ValueError("no such file")

    with pytest.raises(ValueError, match=r"^no such file"):
        trainer_of(lightning, FisherMaskCallback(0.3)).fit(
            module_of(lightning), DataLoader(Broken(*samples().tensors), 8)
        )
    inputs, labels = samples().tensors
    module = module_with(cross_entropy)
    with pytest.raises(DataError, match="3 classes"):
        trainer_of(lightning, FisherMaskCallback(0.3)).fit(
            module, DataLoader(TensorDataset(inputs, labels + 3), 40)
        )
    assert not module.done


def test_a_first_batch_that_fails_leaves_no_hook():
    def loss(module, inputs, labels):
        module(inputs)
        raise KeyError("other")

    module = module_with(loss)
    with pytest.raises(KeyError, match="other"):
        trainer_of(lightning, FisherMaskCallback(0.3)).fit(module, shuffled())
    assert not module._forward_hooks
