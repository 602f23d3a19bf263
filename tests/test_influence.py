"""One sample's step on others, against forms written out by autograd, one pair at a time."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._pytree import tree_map

from gradmask import influence
from gradmask.errors import DataError, ModelError, OptionError
from gradmask.fisher.likelihood import draw_directions
from gradmask.influence import distribution, forms, problem, samples, steps

sys.path.insert(0, str(Path(__file__).parent / "fisher"))
import cases
from cases import CLASSES, Net, all_bits, all_labels, call, given, randomise
from test_state import Failure, build, state

STEP = 0.03
TOLERANCE = 1e-9


pytestmark = pytest.mark.usefixtures("repeatable")

# The oracle: one matrix F for each probe sample, by a loop over all of its labels.


def one_of(data, i):
    return tree_map(lambda t: t[i : i + 1] if isinstance(t, torch.Tensor) else t, data)


def flat_gradient(model, value):
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(parameters, found, strict=True)
        ]
    )


def source_gradients(model, sources, loss):
    inputs, targets = sources
    return torch.stack(
        [
            flat_gradient(model, loss(call(model, one_of(inputs, i)), targets[i : i + 1]))
            for i in range(len(targets))
        ]
    )


def fisher_matrices(model, probe, targets, loss, labels):
    for i in range(len(targets)):
        outputs = call(model, one_of(probe, i))
        total = 0.0
        for weight, target in labels(outputs, targets[i : i + 1]):
            g = flat_gradient(model, loss(outputs, target))
            total = total + weight * torch.outer(g, g)
        yield total


def expected_forms(case, labels):
    """½ ε² g_iᵀ F(x_j) g_i and ½ ε² Σ_k a_kk g_ik²."""
    case.model.eval()
    g = source_gradients(case.model, case.sources, case.loss)
    matrices = list(fisher_matrices(case.model, *case.probe, case.loss, labels))
    pairs = [torch.einsum("ia,ab,ib->i", g, f, g) for f in matrices]
    diagonal = sum(f.diagonal() for f in matrices) / len(matrices)
    return 0.5 * STEP**2 * torch.stack(pairs, 1), 0.5 * STEP**2 * (g.square() @ diagonal)


def expected_divergences(case, step):
    """Σ_c p_c log(p_c / q_c) from two plain forward passes for each pair."""
    case.model.eval()
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    rows = []
    for g in source_gradients(case.model, case.sources, case.loss):
        pairs = []
        for i in range(len(case.probe[1])):
            x = one_of(case.probe[0], i)
            with torch.no_grad():
                p = case.log_probabilities(call(case.model, x))
                start = 0
                old = [q.clone() for q in parameters]
                for q in parameters:
                    q -= step * g[start : start + q.numel()].view_as(q)
                    start += q.numel()
                q = case.log_probabilities(call(case.model, x))
                for parameter, value in zip(parameters, old, strict=True):
                    parameter.copy_(value)
            pairs.append((p.exp() * (p - q)).sum())
        rows.append(torch.stack(pairs))
    return torch.stack(rows)


def assert_close(found, expected, tolerance=TOLERANCE):
    assert found.shape == expected.shape
    assert not found.requires_grad
    error = ((found - expected).abs() / expected.abs().max()).max().item()
    assert error <= tolerance, f"relative error {error:.1e}"


class Case:
    """A model, sources and a probe, and what its outputs mean."""

    def __init__(self, model, inputs, targets, name="cross_entropy", sizes=(3, 5), classes=1):
        self.model, self.name, self.dimension = randomise(model), name, classes
        self.sources, self.probe = ((inputs(n), targets(n)) for n in sizes)
        self.labels = all_bits if name == "bernoulli" else self._all_labels
        self.loss = cases.bernoulli if name == "bernoulli" else self._cross_entropy

    def _cross_entropy(self, outputs, target):
        return cases.cross_entropy(outputs.movedim(self.dimension, 1), target)

    def _all_labels(self, outputs, target):
        return all_labels(outputs.movedim(self.dimension, 1), target)

    def log_probabilities(self, outputs):
        if self.name == "bernoulli":
            return torch.stack([F.logsigmoid(outputs), F.logsigmoid(-outputs)])
        return outputs.log_softmax(self.dimension)

    def measure(self, **options):
        probe = self.probe if options.get("fisher") == "empirical" else self.probe[0]
        return influence(
            self.model, self.sources, probe, **{"loss": self.name, "step": STEP} | options
        )


def labels(*positions, classes=CLASSES):
    return lambda n: torch.randint(classes, (n, *positions))


def bits(*shape):
    return lambda n: torch.randint(2, (n, *shape)).double()


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES))


def cnn():
    layers = (nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Tanh(), nn.Conv2d(2, 2, 3))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, CLASSES))


def frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def tied():
    """A layer called twice whose weight is also the head's."""
    layer = nn.Linear(4, 4)
    model = Net(lambda m, x: m.head(m.layer(m.layer(x).tanh()).tanh()), layer=layer)
    model.head = nn.Linear(4, 4)
    model.head.weight = layer.weight
    return model


def unused():
    return Net(lambda m, x: m.net(x), net=mlp(), spare=nn.Linear(2, 2))


def bare():
    """Parameters outside of layers: a product, a sum, and one that only autograd can explain."""
    return Net(
        lambda m, x: (
            (m.net(x) * m.scale + m.shift) @ torch.linalg.matrix_exp(m.odd) / m.temperature
        ),
        net=mlp(),
        temperature=nn.Parameter(torch.tensor(1.3)),  # without a dimension
        scale=nn.Parameter(torch.ones(CLASSES)),
        shift=nn.Parameter(torch.zeros(CLASSES)),
        odd=nn.Parameter(torch.zeros(CLASSES, CLASSES)),
    )


def recurrent():
    def forward(m, x):
        return m.head(m.rnn(x)[0][:, -1])

    return Net(forward, rnn=nn.LSTM(2, 3, batch_first=True), head=nn.Linear(3, CLASSES))


def attention():
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)
    return Net(lambda m, x: m.head(m.layer(x).mean(1)), layer=layer, head=nn.Linear(4, CLASSES))


def language():
    """Logits (N, T, C) with the embedding as the head."""

    def forward(m, tokens):
        return F.linear(m.norm(m.embed(tokens)), m.embed.weight)

    return Net(forward, embed=nn.Embedding(4, 3), norm=nn.LayerNorm(3))


def two_inputs():
    return Net(lambda m, a, b: m.a(a) * m.b(b), a=nn.Linear(2, CLASSES), b=nn.Linear(3, CLASSES))


def keywords(n):
    return {"a": torch.randn(n, 2).double(), "b": torch.randn(n, 3).double()}


def sequence():
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, 3, 1))


CASES = {
    "mlp": lambda **k: Case(mlp(), cases.floats(3), labels(), **k),
    "cnn": lambda **k: Case(cnn(), cases.floats(1, 4, 4), labels(), **k),
    "frozen": lambda **k: Case(frozen(), cases.floats(3), labels(), **k),
    "tied": lambda **k: Case(tied(), cases.floats(4), labels(), **k),
    "unused": lambda **k: Case(unused(), cases.floats(3), labels(), **k),
    "bare": lambda **k: Case(bare(), cases.floats(3), labels(), **k),
    "recurrent": lambda **k: Case(recurrent(), cases.floats(3, 2), labels(), **k),
    "attention": lambda **k: Case(attention(), cases.floats(3, 4), labels(), **k),
    "parametrised": lambda **k: Case(
        nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, CLASSES)),
        cases.floats(3),
        labels(),
        **k,
    ),
    "keywords": lambda **k: Case(two_inputs(), keywords, labels(), **k),
    "sequence": lambda **k: Case(sequence(), cases.floats(2, 4), labels(3, classes=3), **k),
    "language": lambda **k: Case(
        language(), cases.tokens(3, vocabulary=4), labels(3), classes=2, **k
    ),
    "one logit": lambda **k: Case(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
        cases.floats(3),
        bits(1),
        "bernoulli",
        **k,
    ),
    "flat logit": lambda **k: Case(
        Net(lambda m, x: m.fc(x).squeeze(1), fc=nn.Linear(3, 1)),
        cases.floats(3),
        bits(),
        "bernoulli",
        **k,
    ),
    "many bits": lambda **k: Case(nn.Linear(3, 3), cases.floats(3), bits(3), "bernoulli", **k),
}
# PyTorch has no forward derivative of its fused weight normalisation.
FORWARD = [name for name in CASES if name != "parametrised"]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


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
    for fisher, labels in (("exact", case.labels), ("empirical", given)):
        _, diagonal = expected_forms(case, labels)
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


WAYS = [
    {"method": "kl"},
    {},
    {"fisher": "empirical"},
    {"fisher": "sampled"},
    {"method": "diagonal"},
    {"method": "diagonal", "fisher": "sampled"},
]


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


# State and errors.


def small_data(options):
    inputs, targets = torch.randn(3, 2, 4).double(), torch.tensor([0, 1, 3])
    probe, labels = torch.randn(2, 2, 4).double(), torch.tensor([2, 1])
    return (inputs, targets), (probe, labels) if options.get("fisher") == "empirical" else probe


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("batched", [False, True])
def test_nothing_changes(options, batched, monkeypatch):
    monkeypatch.setattr(steps, "ONE_BY_ONE", () if batched else ("cpu",))
    torch.backends.mha.set_fastpath_enabled(True)
    model, data = build(), small_data(options)
    before = state(model)
    influence(model, *data, **options)
    assert state(model) == before
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("at", range(0, 14, 2))
def test_nothing_changes_after_a_failure(options, at):
    """The model fails in its k-th forward pass: in probing, in gradients, in steps."""
    model, data, calls = build(), small_data(options), itertools.count()
    forward = model.function

    def failing(m, x):
        h = forward(m, x)
        if next(calls) == at:
            raise Failure
        return h

    model.function = failing
    before = state(model)
    try:
        influence(model, *data, **options)
    except Failure:
        assert next(calls) > at
    else:
        assert next(calls) <= at  # it was over before
    assert state(model) == before


def test_called_where_gradients_are_off():
    case = CASES["mlp"]()
    for options in ({}, {"method": "kl"}, {"method": "diagonal"}):
        expected = case.measure(**options)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found = case.measure(**options)
            assert torch.equal(found, expected)
            assert not found.is_inference()


X, Y = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (((X, Y), X), {"method": "quadratc"}, OptionError, "Did you mean 'quadratic'"),
        (((X, Y), X), {"fisher": "sample"}, OptionError, "Did you mean 'sampled'"),
        (((X, Y), (X, Y)), {}, DataError, "2 parts of the probe .* fisher='empirical'"),
        (((X, Y), X), {"loss": "bernouli"}, OptionError, "Did you mean 'bernoulli'"),
        (((X, Y), X), {"step": 0.0}, OptionError, "step=0.0"),
        (((X, Y), X), {"step": math.nan}, OptionError, "step=nan"),
        (((X, Y), X), {"memory": 0}, OptionError, "memory=0"),
        (((X, Y), X), {"method": "diagonal", "pairwise": True}, OptionError, "pairwise=False"),
        (((X, Y), X), {"method": "kl", "fisher": "sampled"}, OptionError, "no Fisher information"),
        (((X, Y), X), {"loss": F.cross_entropy}, OptionError, "callable loss"),
        (((X, Y), X), {"loss": F.cross_entropy, "method": "kl"}, OptionError, "callable loss"),
        (((X[:0], Y[:0]), X), {}, DataError, "sources set has no samples"),
        (((X, Y), X[:0]), {}, DataError, "probe set has no samples"),
        (((X, Y), (X[:0], Y[:0])), {"fisher": "empirical"}, DataError, "probe set has no samples"),
        ((X, X), {}, DataError, r"expected one pair \(inputs, targets\)"),
        (((X, Y), X), {"fisher": "empirical"}, DataError, r"expected one pair \(inputs, targets\)"),
        (((X, Y[:3]), X), {}, DataError, "same number of samples"),
        (((X, Y + 1), X), {}, DataError, "expected 0 to 3"),
        (((X, Y), (X, Y - 1)), {"fisher": "empirical"}, DataError, "expected 0 to 3"),
        (((X, Y[:, None]), X), {}, DataError, "do not fit"),
        (((X, 2 * torch.ones(4, 4)), X), {"loss": "bernoulli"}, DataError, "expects 0 to 1"),
        (((X, Y), X), {"loss": "bernoulli"}, DataError, "logits of the targets' shape"),
        (((X / 0, Y), X), {}, DataError, "loss of a batch is nan"),
        (((X, Y), X / 0), {}, DataError, "probe samples contain NaN"),
        (((X, Y), X / 0), {"method": "kl"}, DataError, "probe samples contain NaN"),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        influence(mlp(), *arguments, **options)


def test_error_of_outputs_that_are_no_logits():
    for outputs in (lambda x: (x, x), lambda x: x[:, 0], lambda x: {"scores": x}):
        model = Net(lambda m, x, outputs=outputs: outputs(m.net(x)), net=mlp())
        with pytest.raises(DataError, match="logits"):
            influence(model, (X, Y), X)


def test_error_without_parameters():
    with pytest.raises(ModelError, match="no trainable parameters"):
        influence(mlp().requires_grad_(False), (X, Y), X)


def test_errors_come_before_long_work(monkeypatch):
    """A bad last sample is told before any gradient is formed."""
    monkeypatch.setattr(steps, "captured", None)
    monkeypatch.setattr(forms, "captured", None)
    bad = X.clone()
    bad[-1] = math.nan
    labels = Y.clone()
    labels[-1] = CLASSES
    for method in ("kl", "quadratic"):
        for sources, probe in (((bad, Y), X), ((X, labels), X), ((X, Y), bad)):
            with pytest.raises(DataError):
                influence(mlp(), sources, probe, method=method, memory=1)


def test_batch_statistics_are_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(ModelError, match="batch statistics"):
        influence(model, (X, Y), X)
