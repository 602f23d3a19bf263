import os
import sys
from pathlib import Path

if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    # No files beside the sources, then; but with none at all, each of the hundred processes that
    # tests start would compile PyTorch anew.
    folder = Path(__file__).resolve().parents[1] / "build" / "bytecode"
    sys.pycache_prefix = os.environ.setdefault("PYTHONPYCACHEPREFIX", str(folder))
    sys.dont_write_bytecode = False

import pytest
import torch
from hostile import LAUNCHER
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

if "PYTEST_XDIST_WORKER" in os.environ:  # several at a time: a core for each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tests make tensors without a device")


def pytest_configure(config):
    if config.getoption("--device") != "cpu":
        torch.backends.cudnn.allow_tf32 = False
        TestsOn(config.getoption("--device")).__enter__()


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") != "cpu":
        skip = pytest.mark.skip(reason="about what only CPUs have")
        for item in items:
            if item.get_closest_marker("cpu"):
                item.add_marker(skip)


class TestsOn(TorchFunctionMode):
    """Put what a test makes on a device, unless it says where; what the package makes, it says."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if getattr(function, "__name__", "") in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            with torch.backends.cudnn.flags(enabled=False):  # it has no backward pass in eval mode
                return function(*args, **kwargs)
        if function not in _device_constructors() or kwargs.get("device") or not in_a_test():
            return function(*args, **kwargs)
        if kwargs.get("generator") is not None:
            return function(*args, **kwargs).to(self.device)
        return function(*args, **kwargs | {"device": self.device})


def in_a_test():
    """Whether a test, not this package or a loader, asks for a tensor."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/src/gradmask/" in path or "/utils/data/" in path:
            return False
        if "/tests/" in path and not path.endswith("conftest.py"):
            return True
        frame = frame.f_back
    return False


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """Keep tests away from the user's own cache of decoded images."""
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADMASK_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture
def options():
    """A comparison that takes a second: few digits, a narrow MLP."""
    return {
        "data": "digits",
        "train_size": 150,
        "label_noise": 0.2,
        "augment": False,
        "model": "mlp",
        "width": 16,
        "epochs": 3,
        "seeds": (0, 1),
        "batch_size": 32,
        "device": "cpu",
    }


@pytest.fixture
def repeatable():
    """The same models and data each time; one thread, as the tensors are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """An empty working folder, beside an empty home."""
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    return work
