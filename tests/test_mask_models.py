"""The mask of models that change or are built in unusual ways."""

import pytest
import torch
from small_models import FIRST, pair, two_layers
from torch import nn

from gradmask import FisherMask
from gradmask.errors import GradmaskWarning


def test_layers_frozen_when_the_mask_was_made():
    model = two_layers()
    model[0].requires_grad_(False)
    mask = FisherMask(model, keep=0.5)
    assert mask.kept_fractions == {"1.weight": 1.0, "1.bias": 1.0}
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    mask.attach(optimizer)  # they may thaw
    model[0].requires_grad_(True)
    values = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    values["0.bias"] += 1.0
    values["1.weight"] += 1.0
    values["1.bias"] += 1.0
    with pytest.warns(GradmaskWarning, match="No attached optimizer holds 1.bias, 1.weight"):
        mask.update(values | {"0.weight": torch.arange(12.0).view(3, 4)})
    before = model[0].weight.detach().clone()
    for p in model[0].parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(model[0].weight != before, mask.masks["0.weight"])
    assert not mask.masks["0.weight"].all()


def test_a_layer_that_freezes_and_thaws_keeps_its_mask():
    model = pair()
    head = nn.Linear(1, 1)
    both = nn.Sequential(model, head)
    optimizer = torch.optim.SGD(both.parameters(), lr=0.5)
    mask = FisherMask(both, keep=0.5).attach(optimizer)
    mask.update(
        {"0.weight": FIRST["weight"], "1.weight": torch.ones(1, 1) * 3, "1.bias": torch.zeros(1)}
    )
    model.requires_grad_(False)
    mask.attach(torch.optim.SGD(head.parameters(), lr=0.1))
    model.requires_grad_(True)
    model.weight.grad = torch.ones(1, 2)
    optimizer.step()
    assert model.weight.tolist() == [[0.5, 2.0]]


def test_parameters_replaced_after_the_mask_was_made():
    model = pair()
    mask = FisherMask(model, keep=0.5)
    model.weight = nn.Parameter(torch.tensor([[5.0, 6.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    mask.attach(optimizer)
    mask.update(FIRST)
    model.weight.grad = torch.ones(1, 2)
    optimizer.step()
    assert model.weight.tolist() == [[4.0, 6.0]]

    def update():
        with pytest.warns(GradmaskWarning, match="No attached optimizer holds weight"):
            mask.update(FIRST)

    for renew in (update, lambda: mask.load_state_dict(mask.state_dict())):
        model.weight = nn.Parameter(torch.tensor([[5.0, 6.0]]))
        renew()
        model.weight.grad = torch.ones(1, 2)
        mask.apply_()
        assert model.weight.grad.tolist() == [[1.0, 0.0]]


def test_a_module_used_under_two_names_has_one_mask():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mask = FisherMask(model, keep=0.4).attach(optimizer)
    mask.refresh([(torch.randn(9, 3), torch.randint(0, 2, (9,)))])
    assert mask.masks.keys() == {"0.weight", "0.bias", "3.weight", "3.bias"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p != before[name], mask.masks[name])


@pytest.mark.parametrize("scope", ["gradient", "update"])
def test_refreshing_in_inference_mode(scope):
    model, data = two_layers(), [(torch.randn(9, 4), torch.randint(0, 2, (9,)))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mask = FisherMask(model, keep=0.4, scope=scope).attach(optimizer)
    with torch.inference_mode():
        mask.refresh(data)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    nn.functional.cross_entropy(model(data[0][0]), data[0][1]).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p != before[name], mask.masks[name])


def test_shares_of_a_parameter_without_entries():
    model = pair()
    model.register_parameter("empty", nn.Parameter(torch.zeros(0)))
    mask = FisherMask(model, keep=0.5)
    mask.update(FIRST | {"empty": torch.zeros(0)})
    assert mask.kept_fractions == {"empty": 1.0, "weight": 0.5}
    assert mask.kept_fraction == 0.5
