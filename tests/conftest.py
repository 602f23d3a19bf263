import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # several at a time: a core for each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


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
