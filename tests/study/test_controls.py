import copy

import pytest
import torch
from torch import nn

from gradmask import FisherMask
from gradmask.study.arms import parse_arm
from gradmask.study.controls import NoMask, Slow, SlowMatched, new_mask


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.BatchNorm1d(7), nn.Linear(7, 3)).double()


def batches(count=6):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 5, generator=generator, dtype=torch.float64),
            torch.randint(3, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def steps(model, optimizer, scheduler=None, scaler=None):
    for inputs, labels in batches():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if scheduler is not None:
            scheduler.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


OPTIMIZERS = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.1),
    "adam, lr as a tensor": lambda p, lr: torch.optim.Adam(
        p, torch.tensor(lr, dtype=torch.float64), foreach=False
    ),
    "groups": lambda p, lr: torch.optim.SGD([{"params": [q], "lr": lr} for q in p], lr),
}
SCHEDULES = {
    "none": lambda o, lr: None,
    "cosine": lambda o, lr: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
    "lambda": lambda o, lr: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "onecycle": lambda o, lr: torch.optim.lr_scheduler.OneCycleLR(
        o, lr, total_steps=7, cycle_momentum=False
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("first", ["mask", "schedule"])
def test_slow_is_training_at_a_part_of_the_learning_rate(optimizer, schedule, first):
    if optimizer.startswith("adam,") and schedule == "onecycle":
        pytest.skip("OneCycleLR writes floats over a tensor")
    rate, keep = 0.125, 0.25  # powers of two: the products are exact
    model, plain = network(), network()
    slow = OPTIMIZERS[optimizer](list(model.parameters()), rate)
    scheduler = SCHEDULES[schedule](slow, rate) if first == "schedule" else None
    mask = Slow(model, keep).attach(slow)
    scheduler = scheduler or SCHEDULES[schedule](slow, rate)
    reference = OPTIMIZERS[optimizer](list(plain.parameters()), rate * keep)
    found = steps(model, slow, scheduler)
    expected = steps(plain, reference, SCHEDULES[schedule](reference, rate * keep))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert not torch.equal(
        found, steps(network(), OPTIMIZERS[optimizer](list(network().parameters()), rate))
    )
    rates = [float(group["lr"]) for group in slow.param_groups]
    assert rates == pytest.approx([float(g["lr"]) / keep for g in reference.param_groups])
    mask.detach()
    assert not slow._optimizer_step_pre_hooks


def test_slow_with_a_scaler_and_in_a_wrapper():
    model, plain = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner, self.param_groups = inner, inner.param_groups

        def step(self, closure=None):
            return self.inner.step(closure)

    wrapper = Wrapper(optimizer)
    Slow(model, 0.5).attach(wrapper)
    found = steps(model, wrapper)
    assert torch.equal(found, steps(plain, torch.optim.SGD(plain.parameters(), 0.25)))
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_slow_after_a_step_that_failed():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    Slow(model, 0.5).attach(optimizer)

    def failing():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure=failing)
    assert optimizer.param_groups[0]["lr"] == 0.5
    optimizer.param_groups[0]["lr"] = 0.125  # as a schedule would
    before = model[0].bias.detach().clone()
    model[0].bias.grad = torch.ones_like(before)
    optimizer.step()
    assert torch.equal(model[0].bias, before - 0.0625)
    assert optimizer.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "groups"])
def test_matched_slow_training_scales_each_tensors_step(optimizer):
    """Against steps taken by hand: Δw times the share that a Fisher mask keeps."""
    model = network()
    reference = copy.deepcopy(model)
    slow = OPTIMIZERS[optimizer](list(model.parameters()), 0.1)
    mask = SlowMatched(model, 0.3, seed=3).attach(slow)
    mask.refresh(batches(2))
    fisher = FisherMask(copy.deepcopy(reference), 0.3, seed=3)
    fisher.refresh(batches(2))
    shares = fisher.kept_fractions
    assert len(set(shares.values())) > 2
    by_hand = OPTIMIZERS[optimizer](list(reference.parameters()), 0.1)
    for inputs, labels in batches():
        for net, opt in ((model, slow), (reference, by_hand)):
            opt.zero_grad()
            nn.functional.cross_entropy(net(inputs), labels).backward()
        slow.step()
        before = {name: p.detach().clone() for name, p in reference.named_parameters()}
        by_hand.step()
        with torch.no_grad():
            for name, p in reference.named_parameters():
                p.copy_(before[name] + shares[name] * (p - before[name]))
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("kind", [NoMask, Slow, SlowMatched])
def test_controls_leave_gradients_as_they_are(kind):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    mask = kind(model, 0.25).attach(optimizer)
    mask.refresh(batches(1))
    inputs, labels = batches()[0]
    with mask.collect() if kind is not SlowMatched else torch.enable_grad():
        nn.functional.cross_entropy(model(inputs), labels).backward()
    before = [p.grad.clone() for p in model.parameters()]
    mask.apply_()
    assert all(torch.equal(g, p.grad) for g, p in zip(before, model.parameters(), strict=True))
    norm = mask.clip_grad_norm_(1e-3)
    assert norm == pytest.approx(float(torch.nn.utils.get_total_norm(before)))
    other = kind(network(1), 0.25)
    other.load_state_dict(mask.state_dict())
    assert other.kept_fractions == mask.kept_fractions


def test_arms_make_their_masks(tmp_path):
    model = network()
    fixed = FisherMask(model, 0.5)
    fixed.refresh(batches(1))
    fixed.save(tmp_path / "mask.safetensors")
    kinds = {
        "none": NoMask,
        "early:patience=2": NoMask,
        "slow:keep=0.5": Slow,
        "slow_matched:keep=0.5": SlowMatched,
        "random_matched:keep=0.5:scope=update": FisherMask,
        f"fixed:file={tmp_path}/mask.safetensors": FisherMask,
    }
    for name, kind in kinds.items():
        mask = new_mask(parse_arm(name), model, keep=0.1, max_samples=8)
        assert isinstance(mask, kind)
    assert new_mask(parse_arm("random:keep=0.5"), model, keep=0.1).keep == 0.5
    assert new_mask(parse_arm("random"), model, keep=0.1).keep == 0.1
    mask = new_mask(parse_arm(f"fixed:file={tmp_path}/mask.safetensors"), model, seed=3)
    mask.refresh(batches(1))
    assert all(torch.equal(mask.masks[name], fixed.masks[name]) for name in fixed.masks)
