import pytest
import torch

from gradmask.fisher import diagonal, rules


@pytest.fixture(autouse=True)
def _seeded():
    """The same models and data each time; one thread, as the tensors are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fallen(monkeypatch):
    """Names of the parameters that were measured one sample at a time."""
    names = set()
    original = diagonal.per_sample_squares

    def record(model, inputs, targets, parameters, **kwargs):
        names.update(parameters)
        return original(model, inputs, targets, parameters, **kwargs)

    monkeypatch.setattr(diagonal, "per_sample_squares", record)
    return names


@pytest.fixture
def own_rules(monkeypatch):
    """Rules registered in the test are gone after it."""
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
