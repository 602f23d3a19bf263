"""Precision, memory layout, compilation, and steps that never wait for the device."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from gradmask import FisherMask, fisher_diagonal
from gradmask.audit import Dynamics
from gradmask.errors import OptionError
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.images import load_images
from gradmask.recipes.data.transforms import Normalize, augment
from gradmask.recipes.training import run as training
from gradmask.recipes.training.components import check_together, new_model
from gradmask.recipes.training.run import train_run
from gradmask.recipes.training.weights import load_weights, saved_epochs, weights_path

CONFIG = Comparison(
    data="digits",
    train_size=150,
    model="small_cnn",
    width=4,
    arms=("fisher",),
    seeds=(0,),
    epochs=3,
    batch_size=40,
    schedule="cosine",
    save_every=1,
    device="cpu",
)


def train(config, directory, arm="fisher"):
    result = train_run(config, load_images(config, 0), arm, 0, directory)
    assert saved_epochs(directory)[-1] == config.epochs
    model = new_model(config, load_images(config, 0), 0)
    load_weights(weights_path(directory, config.epochs), model)  # names as without the option
    return result["epochs"], model.state_dict()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(CONFIG, tmp_path_factory.mktemp("plain"))


def seen_dtypes(monkeypatch):
    found = []
    original = nn.Conv2d.forward

    def forward(self, x):
        out = original(self, x)
        found.append((self.training, out.dtype))
        return out

    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    return found


@pytest.mark.parametrize("arm", ["fisher", "sam"])
@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_precision(precision, dtype, arm, plain, tmp_path, monkeypatch):
    found = seen_dtypes(monkeypatch)
    epochs, weights = train(replace(CONFIG, precision=precision), tmp_path / "a", arm)
    assert (True, dtype) in found
    assert (False, dtype) in found
    assert (True, torch.float32) not in found
    # The Fisher pass runs in float32, in eval mode.
    assert ((False, torch.float32) in found) == (arm == "fisher")
    assert all(w.dtype in (torch.float32, torch.int64) for w in weights.values())
    if arm == "fisher":
        assert epochs[-1]["train_loss"] == pytest.approx(plain[0][-1]["train_loss"], rel=0.1)
        assert epochs[-1]["train_loss"] != plain[0][-1]["train_loss"]


def test_a_resumed_run_keeps_the_loss_scale(tmp_path, monkeypatch):
    """Overflow changes the scale; it must be the same after going on."""
    config = replace(CONFIG, precision="fp16", checkpoint_every=1)
    original = training.new_state
    scales = []

    def small_scale(*args):
        state = original(*args)
        state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=3)
        states.append(state)
        return state

    states = []
    monkeypatch.setattr(training, "new_state", small_scale)
    _, whole = train(config, tmp_path / "whole")
    scales.append(states[-1].scaler.get_scale())

    class Stop(Exception):
        pass

    def stop(self):
        if self.epoch == 2:
            raise Stop
        return original_next(self)

    original_next = training.RunState.next_epoch
    with monkeypatch.context() as patch:
        patch.setattr(training.RunState, "next_epoch", stop)
        with pytest.raises(Stop):
            train(config, tmp_path / "out")
    _, resumed = train(config, tmp_path / "out")
    assert states[-1].scaler.get_scale() == scales[0] != 2.0**30
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_channels_last(plain, tmp_path, monkeypatch):
    layouts = []
    original = nn.Conv2d.forward

    def forward(self, x):
        last = torch.channels_last
        shape = x.shape[1] > 1 and x.shape[2] > 1
        layouts.append(not shape or x.is_contiguous(memory_format=last))
        return original(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    epochs, weights = train(replace(CONFIG, channels_last=True), tmp_path)
    assert all(layouts)
    for name, expected in plain[1].items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-2, atol=1e-4)
    assert epochs[-1]["kept"] == pytest.approx(plain[0][-1]["kept"], abs=1e-3)


def test_inputs_are_channels_last():
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    plain, last = (Normalize.of(images, channels_last=c)(images) for c in (False, True))
    assert torch.equal(plain, last)
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_fisher_and_mask_of_a_channels_last_model():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 5)).double()
    x, y = torch.randn(6, 3, 9, 9, dtype=torch.float64), torch.randint(5, (6,))
    expected = fisher_diagonal(model, [(x, y)])
    mask = FisherMask(model, 0.3)
    mask.update(expected)
    last = {"memory_format": torch.channels_last}
    model.to(**last)
    found = fisher_diagonal(model, [(x.contiguous(**last), y)])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=0)
    nn.functional.cross_entropy(model(x), y).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    mask.apply_()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, before[name] * mask.masks[name])


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.slow
def test_compiled(tmp_path):
    config = replace(CONFIG, model="mlp", width=16)
    plain = train(config, tmp_path / "plain")
    counters["stats"].clear()
    epochs, weights = train(replace(config, compile=True), tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] > 1  # one tells whether compilation works here
    assert epochs[-1]["train_loss"] == pytest.approx(plain[0][-1]["train_loss"], rel=1e-3)
    for name, expected in plain[1].items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-2, atol=1e-3)


def test_compilation_that_cannot_work_is_refused_at_once(monkeypatch):
    def broken(*args):
        raise RuntimeError("no compiler found\nmore")

    monkeypatch.setattr(torch, "compile", lambda *_: broken)
    with pytest.raises(OptionError, match=r"compile cannot work here: no compiler found$"):
        check_together(replace(CONFIG, compile=True), 1)


@pytest.mark.parametrize("name", ["compile", "channels_last", "precision"])
def test_not_with_shards(name):
    value = "fp16" if name == "precision" else True
    config = replace(CONFIG, engine="fsdp", **{name: value})
    with pytest.raises(OptionError, match="engine=fsdp"):
        check_together(config, 2)


class Waits(TorchDispatchMode):
    """Counts operations whose result the processor must wait for, and copies to a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
        name, options = function._overloadpacket.__name__, kwargs or {}
        self.count += name in waits
        if name == "_to_copy" and not options.get("non_blocking"):
            self.count += options.get("device", args[0].device) != args[0].device
        return function(*args, **options)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("arm", ["none", "fisher", "fisher:scope=update", "sam"])
def test_no_step_waits_for_the_device(arm, precision, tmp_path, monkeypatch):
    counts = []
    original = training.train_epoch

    def counted(*args):
        with Waits() as waits:
            found = original(*args)
        counts.append(waits.count)
        return found

    monkeypatch.setattr(training, "train_epoch", counted)
    # On CPUs it looks at ids and labels; on other devices see the test below.
    monkeypatch.setattr(Dynamics, "update", lambda *_: None)
    config = replace(CONFIG, precision=precision, epochs=2, batch_size=20)
    train(config, tmp_path, arm)
    assert counts == [1, 1]  # the epoch's loss


def test_dynamics_do_not_wait_for_the_device():
    ids = torch.empty(8, dtype=torch.int64, device="meta")
    logits, targets = torch.empty(8, 3, device="meta"), ids
    dynamics = Dynamics(20)
    dynamics.update(ids, logits, targets)  # moves the state there
    with Waits() as waits:
        dynamics.update(ids, logits, targets)
    assert waits.count == 0


def test_waits_are_counted():
    with Waits() as waits:
        torch.ones(2).sum().item()
        assert torch.ones(1) == 1
        torch.ones(1).to("meta", non_blocking=True)
        torch.ones(1).double()
    assert waits.count == 2
    with waits:
        torch.ones(1).to("meta", torch.float64)
    assert waits.count == 3


def test_augmentation_does_not_wait_for_the_device():
    images = torch.empty(4, 3, 8, 8, dtype=torch.uint8, device="meta")
    with Waits() as waits:
        augment(images, torch.Generator())
    assert waits.count == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("arm", ["none", "fisher", "fisher:scope=update", "sam"])
def test_no_step_waits_for_a_gpu(arm, precision, tmp_path, monkeypatch):
    """CUDA itself tells; the first step of an epoch may wait (copies, lazy state)."""
    original = training.train_epoch

    def checked(run, batches_of, images, steps, precision, after_step, *rest):
        def after():
            after_step()
            torch.cuda.set_sync_debug_mode("default" if run.step == steps else "error")

        return original(run, batches_of, images, steps, precision, after, *rest)

    monkeypatch.setattr(training, "train_epoch", checked)
    try:
        train(replace(CONFIG, precision=precision, device="cuda"), tmp_path, arm)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_constants_are_made_once():
    prepare = Normalize((0.5,), (0.25,))
    images = torch.full((2, 1, 3, 3), 255, dtype=torch.uint8)
    assert torch.equal(prepare(images), torch.full((2, 1, 3, 3), 2.0))
    from gradmask.recipes.data.transforms import _constants

    hits = _constants.cache_info().hits
    prepare(images)
    assert _constants.cache_info().hits == hits + 1
