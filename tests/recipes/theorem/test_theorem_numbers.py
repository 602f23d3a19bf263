"""The numbers of theorem 1: divergences, slopes, and the rule they are fitted by."""

import pytest
import torch
from torch import nn

from gradmask.recipes.theorem.numbers import fitted_points, measure, slope, smooth_twin

pytestmark = pytest.mark.usefixtures("repeatable")

RATES = {"lr": 0.1, "lr_over_batch": 0.01}


def samples(count, classes=4, features=6):
    return torch.randn(count, features).double(), torch.randint(classes, (count,))


def network(activation):
    layers = (nn.Linear(6, 8), activation(), nn.Linear(8, 8), activation(), nn.Linear(8, 4))
    return nn.Sequential(*layers).double().eval()


def powers(first, last, count=9):
    return torch.logspace(first, last, count, dtype=torch.float64).tolist()


@pytest.mark.parametrize(
    ("activation", "steps"),
    [
        (nn.Tanh, powers(-6, -2)),
        (nn.SiLU, powers(-6, -2)),
        (nn.ReLU, powers(-6, -4.5)),  # shorter than the way to the first kink
    ],
)
def test_slopes(activation, steps):
    found = measure(network(activation), samples(5), samples(7), steps, RATES)
    assert found["fitted"] == steps
    assert found["slopes"]["kl"] == pytest.approx(2, abs=0.01)
    assert found["slopes"]["error"] == pytest.approx(3, abs=0.1)
    assert found["slopes"]["error_median"] == pytest.approx(3, abs=0.1)


def test_a_kink_between_the_steps_is_seen():
    """One weight just above zero: a longer step switches its unit off."""

    class Kink(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([3e-5], dtype=torch.float64))
            self.relu = nn.ReLU()

        def forward(self, x):
            h = self.relu(self.weight * x)
            return torch.stack([h, 0.1 * h**2], 1)

    x = torch.tensor([1.0, 1.1, 1.2], dtype=torch.float64)
    y = torch.ones(3, dtype=torch.long)  # the step lowers the weight
    steps = powers(-6, -3.5, 11)
    kinked, smooth = Kink(), smooth_twin(Kink())
    off = [
        abs(slope(steps, measure(m, (x, y), (x, y), steps, RATES)["error"], range(11)) - 3)
        for m in (kinked, smooth)
    ]
    assert off[0] > 0.5
    assert off[1] < 0.01


def test_means_and_relative_errors():
    model, sources, probe = network(nn.Tanh), samples(5), samples(7)
    found = measure(model, sources, probe, [0.1, 0.2, 0.3], RATES)
    kl, form = (
        theorem_influence(model, sources, probe, step=0.1, method=method)
        for method in ("kl", "quadratic")
    )
    assert found["kl"][0] == pytest.approx(kl.mean().item())
    assert found["quadratic"][0] == pytest.approx(form.mean().item())
    assert found["error"][0] == pytest.approx((kl - form).abs().mean().item())
    assert found["error_median"][0] == pytest.approx((kl - form).abs().median().item())
    relative = (form.mean(1) / kl.mean(1) - 1).abs()
    at = found["relative_error"]["lr"]
    assert at["step"] == 0.1
    assert at["mean"] == pytest.approx(relative.mean().item())
    assert at["median"] == pytest.approx(relative.median().item())


def theorem_influence(model, sources, probe, **options):
    """Equations 3 and 4 from the predictions before and after, and from the logits' derivative."""
    inputs, step = probe[0], options["step"]
    parameters = dict(model.named_parameters())
    run = lambda p, x: torch.func.functional_call(model, p, (x,)).log_softmax(1)  # noqa: E731
    rows = []
    for x, y in zip(*(t.split(1) for t in sources), strict=True):
        loss = nn.functional.cross_entropy(model(x), y)
        gradients = dict(
            zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True)
        )
        if options["method"] == "kl":
            moved = {n: p.detach() - step * gradients[n] for n, p in parameters.items()}
            p, q = run(parameters, inputs).detach(), run(moved, inputs)
            rows.append((p.exp() * (p - q)).sum(1))
        else:
            here = {n: p.detach() for n, p in parameters.items()}
            p, change = torch.func.jvp(lambda m: run(m, inputs), (here,), (gradients,))
            rows.append(0.5 * step**2 * (p.exp() * change**2).sum(1))
    return torch.stack(rows).detach()


def test_diagonal_is_the_full_form_of_one_parameter():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))

        def forward(self, x):
            return self.weight * x

    found = measure(One(), samples(5, 4, 4), samples(1, 4, 4), [0.1, 0.2, 0.3], RATES)["diagonal"]
    for kind in ("exact", "empirical"):
        for name in ("ratio_median", "ratio_min", "ratio_max", "spearman", "spearman_of_norm"):
            assert found[kind][name] == pytest.approx(1), (kind, name)


def test_slope_of_a_power():
    steps = [1.0, 2.0, 4.0, 8.0]
    values = [5 * step**2.5 for step in steps]
    assert slope(steps, values, range(4)) == pytest.approx(2.5)
    assert slope(steps, [1.0, *values[1:]], [1, 2, 3]) == pytest.approx(2.5)
    assert slope(steps, values, [1, 2]) is None
    assert slope(steps, [0.0, *values[1:]], range(4)) is None


def test_which_steps_are_fitted():
    rows = {
        "quadratic": [1.0, 1.0, 1.0, 1.0],
        "error": [0.5, 0.1, 1e-10, 1e-16],  # too large, just small enough, fine, rounding
        "rounding": [1e-15, 1e-15, 1e-15, 1e-15],
    }
    assert fitted_points(rows) == [1, 2]


def test_smooth_twin():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    twin = smooth_twin(model)
    assert sum(isinstance(m, nn.SiLU) for m in twin.modules()) == 2
    assert sum(isinstance(m, nn.ReLU) for m in twin.modules()) == 0
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == 2
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours is not theirs
    assert smooth_twin(nn.Linear(2, 2)) is None
