"""What the mask refuses, and that it stays as it was when it does."""

import pytest
import torch
from torch import nn

from gradmask import FisherMask
from gradmask.errors import DataError, GradmaskWarning, ModelError, StateError


def masked(**options):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    mask = FisherMask(model, keep=0.5, **options)
    mask.refresh([(torch.randn(8, 4), torch.randint(0, 3, (8,)))])
    return model, mask


def unchanged(mask, before):
    after = mask.state_dict()
    masks, earlier = after.pop("masks"), before.pop("masks")
    assert after == before
    assert masks.keys() == earlier.keys()
    assert all(torch.equal(masks[name], earlier[name]) for name in earlier)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("strategy", ["fisher", "random_matched", "inverse"])
def test_values_that_cannot_be_ordered_leave_the_mask(strategy, bad):
    model, mask = masked(strategy=strategy)
    before = mask.state_dict()
    values = {name: torch.ones_like(p).detach() for name, p in model.named_parameters()}
    values["bias"][1] = bad
    with pytest.raises(DataError, match="NaN, infinite or negative"):
        mask.update(values)
    unchanged(mask, before)


def test_a_warning_taken_as_an_error_leaves_the_mask():
    model, mask = masked()
    before = mask.state_dict()
    with pytest.raises(GradmaskWarning, match="keeps everything"):
        mask.update({name: torch.zeros_like(p) for name, p in model.named_parameters()})
    unchanged(mask, before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight": torch.ones(3, 4)}, "differ: bias"),
        ({"weight": torch.ones(4, 3), "bias": torch.ones(3)}, r"\(4, 3\) for 'weight'"),
        ({"weight": torch.ones(3, 4), "bias": torch.ones(3), "x": torch.ones(1)}, "differ: x"),
    ],
)
def test_values_of_another_model_leave_the_mask(values, message):
    _, mask = masked()
    before = mask.state_dict()
    with pytest.raises(StateError, match=message):
        mask.update(values)
    unchanged(mask, before)


@pytest.mark.parametrize("strategy", ["fisher", "random"])
def test_a_refresh_of_a_frozen_model_leaves_the_mask(strategy):
    model, mask = masked(strategy=strategy)
    before = mask.state_dict()
    model.requires_grad_(False)
    with pytest.raises(ModelError, match="no trainable parameters"):
        mask.refresh([(torch.randn(8, 4), torch.randint(0, 3, (8,)))])
    unchanged(mask, before)


def test_a_refresh_that_fails_still_masks_the_step():
    model, mask = masked()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mask.attach(optimizer)
    with pytest.raises(DataError, match="nan"):
        mask.refresh([(torch.full((2, 4), float("nan")), torch.tensor([0, 1]))])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p != before[name], mask.masks[name])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"refreshes": True}, "damaged"),
        ({"refreshes": 1.0}, "damaged"),
        ({"refreshes": None}, "damaged"),
        ({"masks": {1: torch.ones(3, dtype=torch.bool)}}, "differ: 1, bias, weight"),
        ({"keep": 0.25}, "keep=0.25"),
        ({"strategy": "inverse"}, "strategy='inverse'"),
        ({"kind": "exact"}, "kind='exact'"),
        ({"max_samples": 3}, "max_samples=3"),
        ({"seed": 1}, "seed=1"),
    ],
)
def test_damaged_or_foreign_states_leave_the_mask(damage, message):
    _, mask = masked()
    before = mask.state_dict()
    with pytest.raises(StateError, match=message):
        mask.load_state_dict(mask.state_dict() | damage)
    unchanged(mask, before)


@pytest.mark.parametrize(
    "part",
    ["keep", "scope", "strategy", "kind", "max_samples", "seed", "refreshes", "masks", "version"],
)
def test_states_that_lack_a_part_leave_the_mask(part):
    _, mask = masked()
    before = mask.state_dict()
    state = {key: value for key, value in before.items() if key != part}
    with pytest.raises(StateError, match="not the state" if part == "version" else f"lacks {part}"):
        mask.load_state_dict(state)
    unchanged(mask, before)
