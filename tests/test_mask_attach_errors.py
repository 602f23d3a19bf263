"""What a mask refuses, or warns of, beside an optimizer."""

import pytest
import torch
from masked import fill, half_masked, linear, same, sgd
from torch import nn

from gradmask import FisherMask
from gradmask.errors import (
    DataError,
    GradmaskWarning,
    ModelError,
    OptimizerError,
    OptionError,
    StateError,
)

NOT_HELD = r"No attached optimizer holds .*which keep=0.5 counts"


def test_what_no_attached_optimizer_holds_is_told_once():
    model = nn.Sequential(linear(), linear(3, 2))
    optimizer = sgd(model[1])
    mask = FisherMask(model, keep=0.5).attach(optimizer)
    data = [(torch.randn(8, 4), torch.randint(0, 2, (8,)))]
    with pytest.warns(GradmaskWarning, match=r"holds 0.bias, 0.weight \(65.2% of the parameters\)"):
        mask.refresh(data)
    mask.refresh(data)
    model[0].requires_grad_(False)  # the mend
    FisherMask(model, keep=0.5).attach(optimizer).refresh(data)


def test_a_mask_that_nothing_uses_is_told_once():
    model = linear()
    mask, data = FisherMask(model, keep=0.5), [(torch.randn(8, 4), torch.randint(0, 3, (8,)))]
    mask.refresh(data)
    mask.refresh(data)  # of the same weights
    optimizer = sgd(model)
    fill(model)
    optimizer.step()
    with pytest.warns(GradmaskWarning, match=r"masks nothing: call mask.attach\(optimizer\)"):
        mask.refresh(data)
    optimizer.step()
    mask.refresh(data)
    by_hand = FisherMask(model, keep=0.5)
    by_hand.refresh(data)
    by_hand.apply_()
    optimizer.step()
    by_hand.refresh(data)


def test_all_zero_fisher_masks_nothing_and_says_so():
    model = linear()
    mask = FisherMask(model)
    with pytest.warns(GradmaskWarning, match="keeps everything"):
        mask.update({name: torch.zeros_like(p) for name, p in model.named_parameters()})
    assert mask.kept_fraction == 1.0


def test_a_refresh_that_fails_leaves_the_mask():
    model = linear()
    mask = FisherMask(model, keep=0.5)
    good = (torch.randn(8, 4), torch.randint(0, 3, (8,)))
    mask.refresh([good])
    masks, count = dict(mask.masks), mask.refreshes
    for bad, message in [
        ([(torch.full((2, 4), float("nan")), torch.tensor([0, 1]))], "loss of a batch is nan"),
        ([good, (torch.randn(2, 4), torch.tensor([0, 3]))], "Labels range from 0 to 3"),
        ([], "no samples"),
    ]:
        with pytest.raises(DataError, match=message):
            mask.refresh(bad)
        assert same(mask.masks, masks)
        assert mask.refreshes == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, r"keep=0.0 must be in \(0, 1\]"),
        ({"keep": 1.5}, r"keep=1.5 must be in \(0, 1\]"),
        ({"keep": "half"}, r"keep='half' must be in \(0, 1\]"),
        ({"max_samples": 2.5}, "max_samples=2.5 must be a whole number"),
        ({"scope": "gradients"}, "Did you mean 'gradient'"),
        ({"strategy": "fischer"}, "Did you mean 'fisher'"),
        ({"kind": "empiric"}, "Did you mean 'empirical'"),
        ({"loss": "crossentropy"}, "Did you mean 'cross_entropy'"),
        ({"kind": "exact", "loss": nn.MSELoss()}, "not known"),
        ({"max_samples": 0}, "max_samples=0"),
    ],
)
def test_options_are_checked_at_once(options, message):
    with pytest.raises(OptionError, match=message):
        FisherMask(linear(), **options)


def test_models_that_cannot_be_masked():
    with pytest.raises(ModelError, match="no trainable parameters"):
        FisherMask(linear().requires_grad_(False))
    with pytest.raises(ModelError, match="run one batch first"):
        FisherMask(nn.LazyLinear(3))
    norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(ModelError, match="Layer '1'"):
        FisherMask(norm).refresh([(torch.randn(4, 4), torch.randint(0, 4, (4,)))])


def test_optimizers_that_cannot_be_masked():
    model = linear()
    with pytest.raises(OptimizerError, match=r"got a Linear: give it a torch\.optim optimizer"):
        FisherMask(model).attach(model)
    mask = FisherMask(model)
    with pytest.raises(OptimizerError, match="L-BFGS"):
        mask.attach(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(OptimizerError, match="none of the model's"):
        mask.attach(sgd(linear()))
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = sgd(embedding)
    half_masked(embedding, optimizer)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(OptimizerError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: None, "not the state"),
        (lambda s: s | {"version": 2}, "not the state"),
        (lambda s: {k: v for k, v in s.items() if k != "refreshes"}, "lacks refreshes"),
        (lambda s: s | {"keep": 0.3}, "keep=0.3"),
        (lambda s: s | {"scope": "update"}, "scope='update'"),
        (lambda s: s | {"refreshes": "many"}, "damaged"),
        (lambda s: s | {"refreshes": -1}, "damaged"),
        (lambda s: s | {"masks": [1]}, "damaged"),
        (lambda s: s | {"masks": {"weight": s["masks"]["weight"]}}, "differ: bias"),
        (lambda s: s | {"masks": s["masks"] | {"bias": torch.ones(9, dtype=bool)}}, "shape"),
        (lambda s: s | {"masks": s["masks"] | {"bias": torch.ones(3)}}, "damaged"),
        (lambda s: s | {"masks": s["masks"] | {"bias": "yes"}}, "damaged"),
    ],
)
def test_states_that_do_not_fit(damage, message):
    model = linear()
    mask = FisherMask(model, keep=0.5)
    mask.refresh([(torch.randn(8, 4), torch.randint(0, 3, (8,)))])
    before = mask.state_dict()
    with pytest.raises(StateError, match=message):
        mask.load_state_dict(damage(mask.state_dict()))
    assert same(mask.masks, before["masks"])
    assert mask.refreshes == before["refreshes"]


def test_a_fisher_diagonal_that_does_not_fit():
    mask = FisherMask(linear())
    with pytest.raises(StateError, match="differ: bias"):
        mask.update({"weight": torch.ones(3, 4)})
    with pytest.raises(StateError, match="shape"):
        mask.update({"weight": torch.ones(4, 3), "bias": torch.ones(3)})
