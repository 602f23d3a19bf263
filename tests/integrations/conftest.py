import os

import pytest

from gradmask import FisherMask


@pytest.fixture
def own_environment():
    """Lightning leaves ranks in the environment."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def diagonals(monkeypatch):
    """Every Fisher diagonal that a mask is made of."""
    found, update = [], FisherMask.update

    def noted(self, fisher, unused=()):
        found.append({name.removeprefix("net."): value for name, value in fisher.items()})
        update(self, fisher, unused)

    monkeypatch.setattr(FisherMask, "update", noted)
    return found
