import pytest

from gradmask.fisher import batch, rules


@pytest.fixture(autouse=True)
def _repeatable(repeatable):
    """In all tests here."""


@pytest.fixture
def ways(monkeypatch):
    """How each parameter was measured: by a `rule`, `elementwise`, by `module` or by `sample`."""
    found = {}
    monkeypatch.setattr(batch, "_report", found.update)
    return found


@pytest.fixture
def fallen(monkeypatch):
    """Names of the parameters that were measured one sample at a time, without a rule."""
    names = set()

    def record(ways):
        names.update(name for name, way in ways.items() if way in ("module", "sample"))

    monkeypatch.setattr(batch, "_report", record)
    return names


@pytest.fixture
def own_rules(monkeypatch):
    """Rules registered in the test are gone after it."""
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
