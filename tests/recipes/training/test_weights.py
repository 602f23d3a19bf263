import pytest
import torch
from torch import nn

from gradmask.errors import StateError
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.images import load_images
from gradmask.recipes.training.components import new_model
from gradmask.recipes.training.run import train_run
from gradmask.recipes.training.weights import (
    load_weights,
    save_weights,
    saved_epochs,
    weights_path,
)


def model(width=3):
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))


def test_weights_come_back(tmp_path):
    ours, theirs = model(), model()
    ours(torch.randn(5, 2))
    save_weights(tmp_path / "deep" / "w.pt", ours.state_dict())
    load_weights(tmp_path / "deep" / "w.pt", theirs)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["w.pt"]


def test_what_cannot_be_read(tmp_path):
    path, ours = tmp_path / "w.pt", model()
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    with pytest.raises(StateError, match=r"No weights at .*--save-every"):
        load_weights(path, ours)
    save_weights(path, model(4).state_dict())
    with pytest.raises(StateError, match=r"another network: '0.bias' has shape \(4,\), expected"):
        load_weights(path, ours)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no weights at all"):
        path.write_bytes(damaged)
        with pytest.raises(StateError, match="damaged"):
            load_weights(path, ours)
    assert all(torch.equal(before[name], t) for name, t in ours.state_dict().items())


def test_a_run_keeps_weights(options, tmp_path):
    config = Comparison(**options | {"save_every": 2})
    data = load_images(config, 0)
    last = []
    train_run(
        config, data, "fisher", 0, tmp_path, observe=lambda _row, net, _data: last.append(net)
    )
    assert saved_epochs(tmp_path) == [2, 3]
    found = new_model(config, data, 1)
    load_weights(weights_path(tmp_path, 3), found)
    for a, b in zip(found.parameters(), last[-1].parameters(), strict=True):
        assert torch.equal(a, b)
