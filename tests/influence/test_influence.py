"""One sample's step on others, against forms written out by autograd, one pair at a time."""

import math

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, Net, call, given
from influence_cases import (
    CASES,
    FORWARD,
    STEP,
    WAYS,
    Case,
    expected_divergences,
    expected_forms,
    fisher_matrices,
    flat_gradient,
    labels,
    mlp,
    one_of,
    source_gradients,
)
from torch import nn

from gradmask.fisher.likelihood import draw_directions
from gradmask.influence import distribution, forms, problem, samples, steps

TOLERANCE = 1e-9


pytestmark = pytest.mark.usefixtures("repeatable")


def assert_close(found, expected, tolerance=TOLERANCE):
    assert found.shape == expected.shape
    assert not found.requires_grad
    error = ((found - expected).abs() / expected.abs().max()).max().item()
    assert error <= tolerance, f"relative error {error:.1e}"


def test_quadratic_form(case):
    pairs, _ = expected_forms(case, case.labels)
    assert_close(case.measure(pairwise=True), pairs)
    assert_close(case.measure(), pairs.mean(1))


@pytest.mark.parametrize("name", FORWARD)
def test_quadratic_form_from_derivatives(name, monkeypatch):
    monkeypatch.setattr(forms, "derivatives_pay", lambda s: True)
    case = CASES[name]()
    pairs, _ = expected_forms(case, case.labels)
    assert_close(case.measure(pairwise=True), pairs)


def test_quadratic_form_from_gradients_of_all_labels(case, monkeypatch):
    monkeypatch.setattr(forms, "derivatives_pay", lambda s: False)
    pairs, _ = expected_forms(case, case.labels)
    assert_close(case.measure(pairwise=True), pairs)


def test_quadratic_form_with_the_empirical_fisher(case):
    pairs, _ = expected_forms(case, given)
    assert_close(case.measure(fisher="empirical", pairwise=True), pairs)
    assert_close(case.measure(fisher="empirical"), pairs.mean(1))


def test_diagonal_form(case):
    for fisher, weighed in (("exact", case.labels), ("empirical", given)):
        _, diagonal = expected_forms(case, weighed)
        assert_close(case.measure(method="diagonal", fisher=fisher), diagonal)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("batched", [False, True])
def test_divergence(case, batched, monkeypatch):
    monkeypatch.setattr(steps, "ONE_BY_ONE", () if batched else ("cpu",))
    pairs = expected_divergences(case, 0.3)
    assert_close(case.measure(method="kl", step=0.3, pairwise=True), pairs)
    assert_close(case.measure(method="kl", step=0.3), pairs.mean(1))


@pytest.mark.parametrize(("sources", "expected"), [(CLASSES, True), (4 * CLASSES, False)])
def test_the_cheaper_way_is_taken(sources, expected, monkeypatch):
    used, pay = [], forms.derivatives_pay
    monkeypatch.setattr(forms, "derivatives_pay", lambda s: used.append(pay(s)) or used[0])
    case = CASES["mlp"](sizes=(sources, 3))
    assert_close(case.measure(pairwise=True), expected_forms(case, case.labels)[0])
    assert used == [expected]


@pytest.mark.cpu  # PyTorch has none of recurrent layers on CUDA
@pytest.mark.parametrize("name", FORWARD)
def test_forward_derivatives_exist(name, monkeypatch):
    found = []
    monkeypatch.setattr(
        forms, "derivatives_pay", lambda s: found.append(steps.can_differentiate(s)) or False
    )
    CASES[name]().measure()
    assert found == [True]


@pytest.mark.parametrize("name", ["cnn", "sequence", "language", "bare"])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 5), (5, 1), (2, 3)])
def test_few_samples(name, sizes):
    case = CASES[name](sizes=sizes)
    pairs, diagonal = expected_forms(case, case.labels)
    assert_close(case.measure(pairwise=True), pairs)
    assert_close(case.measure(method="diagonal"), diagonal)
    assert_close(case.measure(fisher="empirical", pairwise=True), expected_forms(case, given)[0])
    assert_close(
        case.measure(method="kl", step=0.3, pairwise=True), expected_divergences(case, 0.3)
    )


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("name", ["cnn", "bare", "language", "tied", "one logit"])
def test_memory_changes_nothing(name, options):
    case = CASES[name](sizes=(5, 7))
    whole = case.measure(**options)
    for memory in (1, 5_000, 20_000, 80_000):
        assert_close(case.measure(memory=memory, **options), whole, 1e-12)


def test_memory_makes_uneven_blocks(monkeypatch):
    """The sizes above are what they are meant to be: one, several and all samples at a time."""
    found = set()
    collect = steps._pairs

    def record(given, value, batched, *change):
        for rows, columns, values in collect(given, value, batched, *change):
            found.add((rows.stop - rows.start, columns.stop - columns.start))
            yield rows, columns, values

    monkeypatch.setattr(steps, "_pairs", record)
    for memory in (1, 5_000, 20_000, 80_000, 1 << 30):
        CASES["cnn"](sizes=(5, 7)).measure(memory=memory)
    assert {(1, 1), (5, 7)} < found
    assert len(found) > 4


@pytest.mark.parametrize("name", ["mlp", "language", "many bits", "one logit"])
def test_sampled(name, monkeypatch):
    case = CASES[name](sizes=(3, 6))
    found = case.measure(fisher="sampled", pairwise=True, seed=1)
    assert torch.equal(found, case.measure(fisher="sampled", pairwise=True, seed=1))
    if name == "one logit":  # its one direction is exact
        assert_close(found, case.measure(pairwise=True))
        return
    assert not torch.equal(found, case.measure(fisher="sampled", pairwise=True, seed=2))
    drawn = []
    keep = lambda *given: drawn.append(draw_directions(*given)) or drawn[-1]  # noqa: E731
    monkeypatch.setattr(problem, "draw_directions", keep)
    case.measure(fisher="sampled", seed=1)
    directions = torch.cat(drawn)
    g = source_gradients(case.model.eval(), case.sources, case.loss)
    columns = []
    for i, v in enumerate(directions):
        outputs = call(case.model, one_of(case.probe[0], i))
        columns.append(0.5 * STEP**2 * (g @ flat_gradient(case.model, (outputs * v).sum())) ** 2)
    assert_close(found, torch.stack(columns, 1))
    mean = torch.stack([case.measure(fisher="sampled", seed=s) for s in range(200)]).mean(0)
    assert torch.allclose(mean, case.measure(), rtol=0.2)


def test_sampled_diagonal_uses_the_same_directions():
    """With one parameter and one probe sample the two forms are the same."""
    one = Net(lambda m, x: m.w * x, w=nn.Parameter(torch.ones(1)))
    case = Case(one, cases.floats(CLASSES), labels(), sizes=(3, 1))
    for fisher in ("exact", "sampled", "empirical"):
        a, b = (case.measure(fisher=fisher, method=m) for m in ("quadratic", "diagonal"))
        assert_close(a, b)


def test_callable_loss():
    case = CASES["cnn"]()
    for method in ("quadratic", "diagonal"):
        plain = case.measure(fisher="empirical", method=method)
        mean = case.measure(fisher="empirical", method=method, loss=nn.CrossEntropyLoss())
        assert_close(mean, plain)


def test_ignored_positions_of_sources():
    case = CASES["sequence"]()
    case.sources[1][:, 0] = -100
    pairs, _ = expected_forms(case, case.labels)
    assert_close(case.measure(pairwise=True), pairs)


def test_probabilities_as_targets():
    case = CASES["sequence"]()
    soft = torch.rand(3, 3, 3).double().softmax(1)
    case.sources = (case.sources[0], soft)
    case.loss = lambda outputs, target: F.cross_entropy(outputs, target, reduction="none").sum()
    g = source_gradients(case.model, case.sources, case.loss)
    case.loss = case._cross_entropy
    f = fisher_matrices(case.model, *case.probe, case.loss, case.labels)
    expected = torch.stack([torch.einsum("ia,ab,ib->i", g, m, g) for m in f], 1)
    assert_close(case.measure(pairwise=True), 0.5 * STEP**2 * expected)


@pytest.mark.parametrize("name", ["mlp", "cnn", "sequence", "one logit"])
def test_theorem(name):
    """The divergence falls as ε², its distance from the quadratic form as ε³ (Theorem 1)."""
    case = CASES[name]()
    epsilons = torch.logspace(-5, -3, 7, dtype=torch.float64)
    kl, form = (
        torch.stack([case.measure(method=m, step=float(e)) for e in epsilons])
        for m in ("kl", "quadratic")
    )
    for values, slope, tolerance in ((kl, 2, 0.05), ((kl - form).abs(), 3, 0.1)):
        x, y = epsilons.log(), values.log()
        x = x - x.mean()
        slopes = (x @ (y - y.mean(0))) / (x @ x)
        assert (slopes - slope).abs().max() < tolerance, slopes


def test_single_precision():
    """Small steps: a plain Σ p (log p − log q) would be rounding alone."""
    case = CASES["mlp"]()
    exact = case.measure(method="kl", step=1e-3, pairwise=True)
    case.model.float()
    case.sources, case.probe = cases.to_dtype((case.sources, case.probe), torch.float32)
    for method in ("kl", "quadratic"):
        found = case.measure(method=method, step=1e-3, pairwise=True)
        assert found.dtype == torch.float32
        assert (found >= 0).all()
        assert torch.allclose(found.double(), exact, rtol=0.05)


def test_half_precision():
    case = CASES["mlp"]()
    options = [{}, {"fisher": "empirical"}, {"method": "diagonal"}]
    exact = [case.measure(**o) for o in options]
    case.model.bfloat16()
    case.sources, case.probe = cases.to_dtype((case.sources, case.probe), torch.bfloat16)
    for option, expected in zip(options, exact, strict=True):
        found = case.measure(**option)
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), expected, rtol=0.1)


def chosen(m, x):
    """As many rows as there are valid positions: by chance as many as samples."""
    valid = x[..., 0] > 0
    h = torch.zeros_like(x)
    h[valid] = m.expert(x[valid])
    return cases.readout(h.sum(1))


@pytest.mark.parametrize("counts", [(1, 1, 2, 0), (1, 2, 0, 1), (1, 1, 1, 1)])
def test_rows_that_are_samples_by_chance_only(counts):
    case = Case(Net(chosen, expert=nn.Linear(3, 3)), cases.floats(3, 3), labels(), sizes=(4, 4))
    for x in (case.sources[0], case.probe[0]):
        for sample, count in zip(x, counts, strict=True):
            sample[:, 0] = torch.where(torch.arange(3) < count, 1, -1) * sample[:, 0].abs()
    pairs, diagonal = expected_forms(case, given)
    assert_close(case.measure(fisher="empirical", pairwise=True), pairs)
    assert_close(case.measure(fisher="empirical", method="diagonal"), diagonal)


@pytest.mark.parametrize("name", ["bare", "mlp", "tied"])
def test_batches_that_are_captured_in_different_ways(name, monkeypatch):
    """What layers explain in one batch may take the slow way in the other."""
    probing = iter([True, False])
    safe_strategies = problem.safe_strategies
    monkeypatch.setattr(
        problem, "safe_strategies", lambda *a: safe_strategies(*a) if next(probing) else {}
    )
    case = CASES[name]()
    pairs, _ = expected_forms(case, given)
    assert_close(case.measure(fisher="empirical", pairwise=True), pairs)


def test_hooks_on_parameters_stay_out_of_it():
    case = CASES["bare"]()
    expected = case.measure()
    for parameter in case.model.parameters():
        parameter.register_hook(lambda g: 3 * g)
    assert_close(case.measure(), expected, 1e-12)


class Output:
    """One of the outputs, summed."""

    empty, loss = frozenset(), "mse"

    def __init__(self, place):
        self.place = place

    def __call__(self, outputs, rows, alone=False):
        return outputs[self.place].sum()


def test_gradients_of_one_term_do_not_stay_for_the_next():
    model = Net(lambda m, x: (m.a(x), m.b(x)), a=nn.Linear(3, 2), b=nn.Linear(3, 2))
    guard = samples.Guard(dict(model.named_parameters()), False, False)
    data = samples.Samples(torch.randn(4, 3), None, 4, "mse", guard)
    with samples.captured(model, data, slice(0, 4)) as batch:
        for place, name in enumerate("ab"):
            groups = batch.gradients(Output(place))
            assert set(groups) == {frozenset({f"{name}.weight", f"{name}.bias"})}


@pytest.mark.parametrize("scale", [1e-12, 1e-8, 1e-5, 1e-3, 1e-2, 0.1, 1.0, 30.0])
def test_divergence_of_close_distributions(scale):
    z, v = torch.randn(2, 4, 2, 5).double()
    found = distribution.divergence(z, z + scale * v)
    assert (found >= 0).all()
    if scale < 1e-4:
        expected = 0.5 * scale**2 * distribution.variance(z, v)
        assert torch.allclose(found, expected, rtol=max(1e-15 / scale, 10 * scale), atol=0)
    else:
        p, q = z.log_softmax(-1), (z + scale * v).log_softmax(-1)
        assert torch.allclose(found, (p.exp() * (p - q)).sum((1, 2)), rtol=1e-8, atol=0)


def test_divergence_where_a_class_is_impossible():
    z = torch.tensor([[[0.0, 1.0, -math.inf]]], dtype=torch.float64)
    w = torch.tensor([[[0.5, 1.0, -math.inf]]], dtype=torch.float64)
    reduced = distribution.divergence(z[..., :2], w[..., :2])
    assert torch.allclose(distribution.divergence(z, w), reduced)
    assert distribution.divergence(w[..., :2], w[..., :2]).item() == 0
    possible = torch.tensor([[[0.0, 1.0, 1.0]]], dtype=torch.float64)
    p, q = z.softmax(-1)[..., :2], possible.softmax(-1)[..., :2]
    assert torch.allclose(distribution.divergence(z, possible), (p * (p / q).log()).sum())
    assert distribution.divergence(possible, z).item() == math.inf
    v = torch.tensor([[[0.5, -1.0, math.nan]]], dtype=torch.float64)
    reduced = distribution.variance(z[..., :2], v[..., :2])
    assert torch.allclose(distribution.variance(z, v), reduced)


def test_models_that_only_run_one_at_a_time(monkeypatch):
    """Control flow on data stops `vmap`; an operation without forward derivative stops `jvp`."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    def branch(m, x):
        h = m.net(x)
        return h * (1.0 if h.sum().item() > -1e9 else 2.0)

    monkeypatch.setattr(steps, "ONE_BY_ONE", ())
    for forward in (branch, lambda m, x: Double.apply(m.net(x))):
        case = Case(Net(forward, net=mlp()), cases.floats(3), labels())
        assert_close(case.measure(pairwise=True), expected_forms(case, case.labels)[0])
        pairs = expected_divergences(case, 0.3)
        assert_close(case.measure(method="kl", step=0.3, pairwise=True), pairs)


def test_called_where_gradients_are_off():
    case = CASES["mlp"]()
    for options in ({}, {"method": "kl"}, {"method": "diagonal"}):
        expected = case.measure(**options)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found = case.measure(**options)
            assert torch.equal(found, expected)
            assert not found.is_inference()
