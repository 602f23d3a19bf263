"""Masks in safetensors files and lists of entries, and masks that were measured elsewhere."""

import json
import math
import os
import sys
from contextlib import suppress

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file

from gradmask import (
    FisherMask,
    load_masks,
    make_masks,
    masks_from_indices,
    masks_to_indices,
    save_masks,
)
from gradmask.errors import OptionError, StateError
from gradmask.mask_files import read_masks

pytestmark = pytest.mark.usefixtures("repeatable")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def batches():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(4, 6, 5, generator=generator)
    return [(x, torch.randint(3, (6,), generator=generator)) for x in inputs]


def random_masks(model, seed=0, keep=0.4):
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.detach() for name, p in model.named_parameters()}
    return make_masks(shapes, keep, strategy="random", generator=generator)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, mask in expected.items():
        assert found[name].dtype == torch.bool
        assert torch.equal(found[name], mask), name


def train(model, optimizer, steps=20):
    data = batches()
    for step in range(steps):
        inputs, targets = data[step % len(data)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (8,), (9,), (3, 5, 7), (4, 0, 2)])
def test_a_file_gives_the_masks_back(shape, tmp_path):
    generator = torch.Generator().manual_seed(2)
    masks = {"a.weight": torch.rand(shape, generator=generator) < 0.5, "é": torch.ones(3) > 0}
    save_masks(tmp_path / "m.safetensors", masks, {"from": "here", "share": 0.1})
    assert_equal(load_masks(tmp_path / "m.safetensors"), masks)
    assert read_masks(tmp_path / "m.safetensors")[1] == {"from": "here", "share": 0.1}
    stored = load_file(tmp_path / "m.safetensors")
    assert stored["a.weight"].numel() == math.ceil(math.prod(shape) / 8)
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_a_column_major_mask(tmp_path):
    mask = torch.rand(5, 3).t() < 0.5
    save_masks(tmp_path / "m", {"w": mask})
    assert_equal(load_masks(tmp_path / "m"), {"w": mask})


def test_every_damaged_byte_is_found(tmp_path):
    path = tmp_path / "m"
    model = network()
    mask = FisherMask(model, keep=0.3)
    mask.refresh(batches())
    mask.save(path)
    sound = path.read_bytes()
    for place in range(0, len(sound), 3):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 4]) + sound[place + 1 :])
        with suppress(StateError):
            found, rest = read_masks(path)
            assert_equal(found, mask.masks)  # a byte that nothing depends on
            assert rest["refreshes"] == 1
    for end in (0, 5, 100, len(sound) - 1):
        path.write_bytes(sound[:end])
        with pytest.raises(StateError, match="cannot be read"):
            load_masks(path)


def test_other_files(tmp_path):
    with pytest.raises(StateError, match=r"m.*cannot be read.*No such file"):
        load_masks(tmp_path / "m")
    save_file({"w": torch.ones(3)}, tmp_path / "weights")
    with pytest.raises(StateError, match="holds no masks"):
        load_masks(tmp_path / "weights")
    header = {"format": "gradmask", "version": "9", "shapes": "{}"}
    save_file({}, tmp_path / "later", header)
    with pytest.raises(StateError, match="version 9"):
        load_masks(tmp_path / "later")
    wrong = header | {"version": "1", "metadata": "{}", "shapes": json.dumps({"w": [17]})}
    save_file({"w": torch.zeros(2, dtype=torch.uint8)}, tmp_path / "wrong", wrong)
    with pytest.raises(StateError, match="do not fit"):
        load_masks(tmp_path / "wrong")


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "m"
    masks = random_masks(network())
    save_masks(path, masks)
    with pytest.raises(StateError, match=r"'w' is torch\.float32"):
        save_masks(path, {"w": torch.ones(2)})
    with pytest.raises(TypeError):
        save_masks(path, masks, {"of": object()})
    with pytest.raises(StateError, match="not as a list"):
        save_masks(path, [torch.ones(2) > 0])
    assert_equal(load_masks(path), masks)
    assert os.listdir(tmp_path) == ["m"]


def test_a_state_goes_on_exactly(tmp_path):
    runs = []
    for interrupted in (False, True):
        model = network()
        mask = FisherMask(model, keep=0.3, strategy="random_matched", seed=3)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        mask.attach(optimizer)
        mask.refresh(batches())
        train(model, optimizer, 3)
        if interrupted:
            mask.save(tmp_path / "m")
            mask.detach()
            before = mask.sha256()
            mask = FisherMask(model, keep=0.3, strategy="random_matched", seed=3)
            assert mask.sha256() != before
            mask.load(tmp_path / "m")
            assert mask.sha256() == before
            mask.attach(optimizer)
        train(model, optimizer, 3)
        mask.refresh(batches())
        train(model, optimizer, 3)
        runs.append((model.state_dict(), mask.state_dict(), mask.sha256()))
    assert runs[0][2] == runs[1][2]
    assert_equal(runs[1][1].pop("masks"), runs[0][1].pop("masks"))
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(w, runs[1][0][n]) for n, w in runs[0][0].items())


def test_a_state_of_other_options_or_none(tmp_path):
    model = network()
    FisherMask(model, keep=0.3).save(tmp_path / "empty")
    mask = FisherMask(model, keep=0.3)
    mask.load(tmp_path / "empty")
    assert mask.masks == {}
    with pytest.raises(StateError, match=r"keep=0\.3.*keep=0\.5"):
        FisherMask(model, keep=0.5).load(tmp_path / "empty")
    save_masks(tmp_path / "masks", random_masks(model))
    with pytest.raises(StateError, match="not the state of a FisherMask"):
        mask.load(tmp_path / "masks")


def test_the_sum_is_of_all_of_the_state():
    masks, model = random_masks(network()), network()
    sums = set()
    for turned in [None, *masks]:
        for scope in ("gradient", "update"):
            changed = {n: ~m if n == turned else m for n, m in masks.items()}
            sums.add(FisherMask.from_masks(model, changed, scope=scope).sha256())
    assert len(sums) == 2 * (1 + len(masks))


def test_lists_of_entries():
    model = network()
    masks = random_masks(model) | {"2.bias": torch.zeros(3, dtype=torch.bool)}
    indices = masks_to_indices(masks)
    assert indices["0.weight"].dtype == torch.int64
    assert torch.equal(indices["0.weight"], masks["0.weight"].flatten().nonzero().flatten())
    assert_equal(masks_from_indices(model, indices), masks)
    del indices["2.bias"]  # nothing of it learns
    assert_equal(masks_from_indices(model, indices), masks)
    as_lists = {name: places.tolist() for name, places in indices.items()}
    assert_equal(masks_from_indices(model, as_lists), masks)
    assert not any(m.any() for m in masks_from_indices(model, {}).values())


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        ({"0.weigth": [1]}, r"no trainable parameters 0\.weigth"),
        ({"0.weight": [35]}, "from 0 to 34"),
        ({"0.weight": [-1]}, "from 0 to 34"),
        ({"0.weight": [0.5]}, "whole numbers"),
        ({"0.weight": torch.ones(35) > 0}, "whole numbers"),
        ({"0.weight": torch.zeros(2, 2, dtype=torch.int64)}, "a list"),
    ],
)
def test_lists_that_do_not_fit(indices, words):
    with pytest.raises(StateError, match=words):
        masks_from_indices(network(), indices)


@pytest.mark.parametrize("scope", ["gradient", "update"])
def test_a_fixed_mask_under_weight_decay(scope):
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = random_masks(model)
    mask = FisherMask.from_masks(model, masks, scope=scope)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.5)
    mask.attach(optimizer)
    train(model, optimizer)
    held = [torch.equal(p[~masks[n]], before[n][~masks[n]]) for n, p in model.named_parameters()]
    assert all(held) if scope == "update" else not all(held)
    assert all((p != before[n])[masks[n]].all() for n, p in model.named_parameters())
    assert mask.kept_fraction == pytest.approx(0.4, abs=0.01)
    assert mask.kept_fraction == mask.keep


def test_a_fixed_mask_stays():
    model = network()
    masks = random_masks(model)
    mask = FisherMask.from_masks(model, masks)
    masks["0.weight"].zero_()  # the user's own tensor
    assert mask.masks["0.weight"].any()
    with pytest.raises(OptionError, match="fixed"):
        mask.refresh(iter(()))
    with pytest.raises(OptionError, match="fixed"):
        mask.update({n: p.detach().square() for n, p in model.named_parameters()})
    again = FisherMask.from_masks(model, mask.masks)
    again.load_state_dict(mask.state_dict())
    with pytest.raises(StateError, match="build it with the same options"):
        FisherMask(model).load_state_dict(mask.state_dict())
    with pytest.raises(OptionError, match="fixed"):
        FisherMask(model, strategy="fixed")


def test_a_fixed_mask_of_nothing_and_of_frozen_parameters():
    model = network()
    model[0].requires_grad_(False)
    mask = FisherMask.from_masks(model, masks_from_indices(model, {}))
    assert list(mask.masks) == ["2.weight", "2.bias"]
    assert mask.kept_fraction == mask.keep == 0
    with pytest.raises(StateError, match=r"differ: 0\.bias, 0\.weight"):
        FisherMask.from_masks(model, random_masks(network()))


def test_masks_that_do_not_fit():
    model = network()
    masks = random_masks(model)
    with pytest.raises(StateError, match=r"no mask for 2\.bias.*requires_grad=False"):
        FisherMask.from_masks(model, {n: m for n, m in masks.items() if n != "2.bias"})
    with pytest.raises(StateError, match=r"shape \(5, 7\) for '0.weight', the model \(7, 5\)"):
        FisherMask.from_masks(model, masks | {"0.weight": masks["0.weight"].t()})
    with pytest.raises(StateError, match=r"'2.bias' is torch.float32: give a bool"):
        FisherMask.from_masks(model, masks | {"2.bias": torch.ones(3)})
    with pytest.raises(OptionError, match="scope"):
        FisherMask.from_masks(model, masks, scope="updates")


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        save_masks(tmp_path / "m", random_masks(network()))
    with pytest.raises(ImportError, match="pip install safetensors"):
        load_masks(tmp_path / "m")
    assert os.listdir(tmp_path) == []
