"""Modules, optimizers and options that the callback for Lightning cannot work with."""

import pytest
import torch
from lightning_runs import (
    PACKAGES,
    FisherMaskCallback,
    Pair,
    adam,
    fitted,
    lightning,
    module_of,
    shuffled,
    trainer_of,
)
from torch import nn

from gradmask.errors import (
    DataError,
    GradmaskWarning,
    ModelError,
    OptimizerError,
    OptionError,
)

pytestmark = pytest.mark.usefixtures("repeatable", "own_environment")


def test_a_mask_that_was_never_made():
    with pytest.warns(GradmaskWarning, match="before a mask was made.*refresh='start'"):
        fitted(callback=FisherMaskCallback(0.3), max_epochs=1)
    for options in ({"fast_dev_run": True}, {"max_epochs": 0}):
        callback = FisherMaskCallback(0.3)
        fitted(callback=callback, **options)
        assert callback.mask is None or not callback.mask.refreshes


def loaders(kind):
    return {"list": [shuffled(), shuffled()], "dict": {"a": shuffled(), "b": shuffled()}}[kind]


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_combined_loaders(kind):
    with pytest.raises(DataError, match=rf"is a {kind}.*data="):
        fitted(callback=FisherMaskCallback(0.3, refresh="start"), loader=loaders(kind))


def test_submodules_that_cannot_be_measured():
    with pytest.raises(ModelError, match="no submodule 'nett': it has net"):
        fitted(callback=FisherMaskCallback(0.3, model="nett"))
    with pytest.raises(ModelError, match=r"no forward to measure.*model="):
        trainer_of(lightning, FisherMaskCallback(0.3)).fit(Pair(), shuffled())


def test_optimizers_that_cannot_be_masked():
    class Other(type(module_of(lightning))):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.net.parameters())

    with pytest.raises(OptimizerError, match="L-BFGS"):
        trainer_of(lightning, FisherMaskCallback(0.3)).fit(Other(), shuffled())

    class Spare(type(module_of(lightning))):
        def configure_optimizers(self):
            return adam(nn.Linear(1, 1))

    with pytest.raises(OptimizerError, match="No optimizer of configure_optimizers"):
        trainer_of(lightning, FisherMaskCallback(0.3)).fit(Spare(), shuffled())


def test_deepspeed_is_refused_by_name():
    class DeepSpeedStrategy(lightning.strategies.SingleDeviceStrategy):
        """As Lightning's is called; that needs the package."""

    trainer = trainer_of(
        lightning, FisherMaskCallback(0.3), strategy=DeepSpeedStrategy("cpu"), accelerator="auto"
    )
    with pytest.raises(OptionError, match=r"DeepSpeedStrategy.*strategy='ddp'"):
        trainer.fit(module_of(lightning), shuffled())


@pytest.mark.parametrize(
    "options",
    [{"keep": 0.0}, {"refresh": "never"}, {"refresh": 0}, {"scope": "weights"}, {"unpack": 3}],
)
def test_bad_options_are_told_at_once(options):
    with pytest.raises(OptionError):
        FisherMaskCallback(**options)


def test_it_is_a_callback_of_both():
    for package in PACKAGES.values():
        assert issubclass(FisherMaskCallback, package.Callback)
        trainer = package.Trainer(
            callbacks=FisherMaskCallback(0.3), logger=False, accelerator="cpu"
        )
        assert any(isinstance(c, FisherMaskCallback) for c in trainer.callbacks)
