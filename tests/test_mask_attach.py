"""The mask beside what users do with an optimizer: AMP, clipping, closures, groups, ties."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from wrapping_optimizers import Accelerated

from gradmask import FisherMask
from gradmask.errors import (
    DataError,
    GradmaskWarning,
    ModelError,
    OptimizerError,
    OptionError,
    StateError,
)


def linear(inputs=4, outputs=3):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs)


def half_masked(model, optimizer=None, **options):
    """A mask that keeps the first half of the entries of every parameter, set by hand."""
    mask = FisherMask(model, **options)
    if optimizer is not None:
        mask.attach(optimizer)
    mask.masks = {
        name: (torch.arange(p.numel()) < p.numel() / 2).view(p.shape)
        for name, p in model.named_parameters()
    }
    return mask


def fill(model, value=1.0):
    for p in model.parameters():
        p.grad = torch.full_like(p, value)


def moved(model, before):
    return {n: p.detach() != before[n] for n, p in model.named_parameters()}


def snapshot(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(ours, theirs):
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


@pytest.mark.parametrize("scope", ["gradient", "update"])
def test_a_group_added_later_is_masked(scope):
    model = nn.Sequential(linear(), linear(3, 2))
    optimizer = sgd(model[0])
    mask = half_masked(model, optimizer, scope=scope)
    optimizer.add_param_group({"params": model[1].parameters(), "lr": 0.5})
    before = snapshot(model)
    fill(model)
    optimizer.step()
    assert same(moved(model, before), mask.masks)


def test_parameters_of_another_model_are_left_alone():
    model, other = linear(), linear(5, 2)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    mask = half_masked(model, optimizer)
    before, others = snapshot(model), snapshot(other)
    fill(model)
    fill(other)
    optimizer.step()
    assert same(moved(model, before), mask.masks)
    assert all(m.all() for m in moved(other, others).values())


def test_two_optimizers_share_a_mask():
    model = nn.Sequential(linear(), linear(3, 2))
    first, second = sgd(model[0]), torch.optim.AdamW(model[1].parameters(), weight_decay=0.0)
    mask = half_masked(model, first, scope="update").attach(second)
    before = snapshot(model)
    fill(model)
    first.step()
    second.step()
    assert same(moved(model, before), mask.masks)


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("scope", ["gradient", "update"])
def test_closures_are_masked(scope, keyword):
    model = linear()
    optimizer = sgd(model, weight_decay=0.0)
    mask = half_masked(model, optimizer, scope=scope)
    before = snapshot(model)

    def closure():
        fill(model)
        return torch.tensor(3.0)

    value = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert value == 3.0
    assert same(moved(model, before), mask.masks)


def test_a_step_that_the_scaler_skips():
    model = linear()
    optimizer = sgd(model)
    mask = half_masked(model, optimizer, scope="update")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = snapshot(model)

    def step(gradient):
        scaler.scale(torch.zeros((), requires_grad=True)).backward()
        fill(model, gradient)
        scaler.step(optimizer)
        scaler.update()

    step(float("inf"))
    assert same(snapshot(model), before)
    step(4.0)  # scaled by less now; what matters is which weights move
    assert same(moved(model, before), mask.masks)


def test_clipping_before_and_after_masking():
    model = nn.Linear(4, 1, bias=False)
    mask = half_masked(model, sgd(model))
    fill(model)
    assert nn.utils.clip_grad_norm_(model.parameters(), 100.0) == 2.0  # masked entries count
    mask.apply_()
    assert nn.utils.clip_grad_norm_(model.parameters(), 100.0).item() == pytest.approx(2**0.5)
    once = model.weight.grad.clone()
    mask.apply_()
    assert torch.equal(model.weight.grad, once)
    assert model.weight.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_accumulated_gradients_are_masked_once():
    model = linear()
    optimizer = sgd(model)
    mask = half_masked(model, optimizer)
    x = torch.randn(6, 4)
    for part in x.split(2):
        model(part).square().sum().backward()
    plain = copy.deepcopy(model)
    plain.zero_grad()
    plain(x).square().sum().backward()
    before = snapshot(model)
    optimizer.step()
    for name, p in plain.named_parameters():
        expected = before[name] - 0.1 * p.grad * mask.masks[name]
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), expected)


def test_schedulers_and_optimizer_state_stay_native():
    model = linear()
    optimizer = sgd(model, momentum=0.9)
    half_masked(model, optimizer, scope="update")
    schedule = StepLR(optimizer, 1, 0.5)
    fill(model)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    plain_model = linear()
    plain = sgd(plain_model, momentum=0.9)
    fill(plain_model)
    plain.step()
    assert optimizer.state_dict()["state"].keys() == plain.state_dict()["state"].keys()
    assert model.state_dict().keys() == plain_model.state_dict().keys()


def test_detaching_frees_the_optimizer():
    model = linear()
    optimizer = sgd(model)
    mask = half_masked(model, optimizer, scope="update")
    with pytest.raises(OptimizerError, match="already"):
        mask.attach(optimizer)
    mask.detach()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    before = snapshot(model)
    fill(model)
    optimizer.step()
    assert all(m.all() for m in moved(model, before).values())
    mask.attach(optimizer)


def test_before_the_first_refresh_nothing_is_masked():
    model = linear()
    optimizer = sgd(model)
    mask = FisherMask(model, scope="update").attach(optimizer)
    before = snapshot(model)
    fill(model)
    mask.apply_()
    optimizer.step()
    assert all(m.all() for m in moved(model, before).values())


def test_gradients_that_are_missing():
    model = linear()
    optimizer = sgd(model)
    half_masked(model, optimizer, scope="update")
    before = snapshot(model)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert torch.equal(model.bias.detach(), before["bias"])
    assert not torch.equal(model.weight.detach(), before["weight"])


def test_frozen_and_thawed_between_refreshes():
    model = nn.Sequential(linear(), linear(3, 2))
    data = [(torch.randn(8, 4), torch.randint(0, 2, (8,)))]
    model[0].requires_grad_(False)
    optimizer = sgd(model)
    mask = FisherMask(model, keep=0.5).attach(optimizer)
    mask.refresh(data)
    assert mask.masks.keys() == {"1.weight", "1.bias"}
    model[0].requires_grad_(True)
    mask.refresh(data)
    assert mask.masks.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    before = snapshot(model)
    fill(model)
    optimizer.step()
    assert same(moved(model, before), mask.masks)


def test_tied_weights_have_one_mask():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(6, 4)
            self.decoder = nn.Linear(4, 6, bias=False)
            self.decoder.weight = self.embedding.weight

        def forward(self, x):
            return self.decoder(self.embedding(x).mean(1))

    model = Tied()
    optimizer = sgd(model)
    mask = FisherMask(model, keep=0.5).attach(optimizer)
    mask.refresh([(torch.randint(0, 6, (9, 3)), torch.randint(0, 6, (9,)))])
    assert mask.masks.keys() == {"embedding.weight"}
    before = snapshot(model)
    fill(model)
    optimizer.step()
    assert same(moved(model, before), mask.masks)


def test_model_turned_to_double_after_construction():
    model = linear()
    optimizer = sgd(model)
    mask = half_masked(model, optimizer)
    model.double()
    before = snapshot(model)
    fill(model)
    optimizer.step()
    assert model.weight.dtype == torch.float64
    assert same(moved(model, before), mask.masks)


def test_compiled_models():
    model = torch.compile(nn.Sequential(linear(), nn.ReLU(), linear(3, 2)), backend="eager")
    optimizer = sgd(model)
    mask = FisherMask(model, keep=0.5).attach(optimizer)
    mask.refresh([(torch.randn(8, 4), torch.randint(0, 2, (8,)))])
    plain = model._orig_mod  # whose names these are
    before = snapshot(plain)
    fill(model)
    optimizer.step()
    assert same(moved(plain, before), mask.masks)
    state = mask.state_dict()
    other = FisherMask(plain, keep=0.5)
    other.load_state_dict(state)
    assert same(other.masks, mask.masks)
    state["masks"] = {f"_orig_mod.{name}": m for name, m in state["masks"].items()}  # as before
    other.load_state_dict(state)
    assert same(other.masks, mask.masks)
    assert FisherMask.from_masks(model, state["masks"]).masks.keys() == mask.masks.keys()


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


class Zeroing(torch.optim.SGD):
    """Uses the gradients that it finds, as SAM does, and sets them to zero."""

    def step(self, closure):
        self.zero_grad(set_to_none=False)
        return super().step(closure)


@pytest.mark.parametrize("wrap", [lambda o: o, Accelerated], ids=["plain", "wrapped"])
@pytest.mark.parametrize(("kind", "total"), [(torch.optim.SGD, 3.0), (Zeroing, 1.0)])
def test_a_closure_adds_to_whole_gradients_and_clips_them(wrap, kind, total):
    model = linear()
    optimizer = wrap(kind(model.parameters(), lr=0.1))
    half_masked(model, optimizer)
    fill(model, 2.0)
    norms = []

    def closure():
        for p in model.parameters():
            p.grad.add_(1.0)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1e9)))

    optimizer.step(closure)
    count = sum(p.numel() for p in model.parameters())
    assert norms == [pytest.approx(total * count**0.5)]


class Ignoring(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad)


def test_a_step_that_ignores_its_closure_is_masked():
    model = linear()
    optimizer = Ignoring(model.parameters(), {})
    mask = half_masked(model, optimizer)
    before = snapshot(model)
    fill(model)
    optimizer.step(lambda: None)
    assert same(moved(model, before), mask.masks)
