"""Kinds of Fisher information, losses, layouts of targets, and the errors of each."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CLASSES,
    Net,
    all_bits,
    all_labels,
    assert_close,
    batches,
    bernoulli,
    floats,
    oracle,
    randomise,
)
from torch import nn

from gradmask import fisher_diagonal
from gradmask.fisher.likelihood import IGNORED, direction, draw_directions


def classifier():
    return randomise(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, CLASSES)))


def tagger():
    """Logits (N, C, L) for each of L positions, with a layer that has no rule."""
    return randomise(
        Net(
            lambda m, x: m.head(m.act(m.body(x))).transpose(1, 2),
            body=nn.Linear(3, 5),
            act=nn.PReLU(),
            head=nn.Linear(5, 3),
        )
    )


def language_model():
    """The tagger with logits (N, L, C)."""
    model = tagger()
    model.function = lambda m, x: m.head(m.act(m.body(x)))
    return model


def coins(n):
    return [(floats(3)(k), torch.randint(2, (k, 3)).double()) for k in n]


def coin_model():
    return randomise(nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 3)))


@pytest.mark.parametrize("reduction", ["sum", "none", "mean"])
def test_callable_loss_with_any_reduction(reduction):
    """Each sample is on its own: `mean` does not divide by the batch."""
    model, data = classifier(), batches(floats(3))
    loss = lambda o, t: F.cross_entropy(o, t, reduction=reduction)  # noqa: E731
    assert_close(fisher_diagonal(model, data, loss=loss), oracle(model, data))


def test_callable_mean_over_positions():
    model, data = tagger(), batches(floats(2, 3), classes=3, positions=(2,))
    found = fisher_diagonal(model, data, loss=F.cross_entropy)
    assert_close(found, oracle(model, data, F.cross_entropy))


def test_callable_mean_squared_error():
    model = classifier()
    data = [(floats(3)(n), floats(CLASSES)(n)) for n in (3, 2)]
    found = fisher_diagonal(model, data, loss=F.mse_loss)
    assert_close(found, oracle(model, data, F.mse_loss))


def test_sequence_targets():
    model, data = tagger(), batches(floats(2, 3), classes=3, positions=(2,))
    expected = oracle(model, data)
    assert_close(fisher_diagonal(model, data), expected)
    model.function = language_model().function
    assert_close(fisher_diagonal(model, data), expected)


@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_ignored_positions(kind):
    """Positions marked -100 do not count, nor does a sample that has no others add anything."""
    model, data = tagger(), batches(floats(2, 3), (3,), classes=3, positions=(2,))
    data[0][1][0, 1] = IGNORED
    data[0][1][1] = IGNORED
    labels = {"empirical": lambda o, t: [(1.0, t)], "exact": all_labels_but_ignored}[kind]
    assert_close(fisher_diagonal(model, data, kind=kind), oracle(model, data, labels=labels))


def all_labels_but_ignored(outputs, target):
    for weight, labels in all_labels(outputs, target):
        yield weight, torch.where(target == IGNORED, IGNORED, labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
def test_labels_of_other_integer_types(dtype):
    model, data = classifier(), batches(floats(3), classes=2)
    expected = oracle(model, data)
    data = [(x, y.to(dtype)) for x, y in data]
    assert_close(fisher_diagonal(model, data), expected)
    assert_close(fisher_diagonal(model, data, kind="exact"), oracle(model, data, labels=all_labels))


def test_unsigned_label_that_wraps_to_the_ignored_mark():
    """-100 as an unsigned byte is 156, which is a class like any other."""
    model = randomise(nn.Linear(3, 200))
    data = [(floats(3)(2), torch.tensor([156, 1]))]
    unsigned = [(data[0][0], data[0][1].to(torch.uint8))]
    assert_close(fisher_diagonal(model, unsigned), oracle(model, data))
    for kind in ("sampled", "exact"):
        expected = fisher_diagonal(model, data, kind=kind)
        assert_close(fisher_diagonal(model, unsigned, kind=kind), expected)


def test_probabilities_as_targets():
    model = classifier()
    data = [(floats(3)(n), torch.rand(n, CLASSES).double().softmax(1)) for n in (3, 2)]
    assert_close(fisher_diagonal(model, data), oracle(model, data))
    assert_close(fisher_diagonal(model, data, kind="exact"), oracle_by_labels(model, data))


def oracle_by_labels(model, data):
    return oracle(model, [(x, y.argmax(1)) for x, y in data], labels=all_labels)


def test_exact():
    model, data = classifier(), batches(floats(3), (3, 1, 2))
    assert_close(fisher_diagonal(model, data, kind="exact"), oracle(model, data, labels=all_labels))


@pytest.mark.parametrize("model", [tagger, language_model])
def test_exact_of_sequences(model):
    """Expectation over all labellings of all positions together."""
    data = batches(floats(2, 3), classes=3, positions=(2,))
    torch.manual_seed(1)
    expected = oracle(tagger(), data, labels=all_labels)
    torch.manual_seed(1)
    assert_close(fisher_diagonal(model(), data, kind="exact"), expected)


def test_exact_with_an_impossible_class():
    mask = torch.tensor([0.0, -torch.inf, 0.0, 0.0], dtype=torch.float64)
    model = randomise(Net(lambda m, x: m.fc(x) + mask, fc=nn.Linear(3, CLASSES)))
    data = [(floats(3)(3), torch.tensor([0, 2, 3]))]
    assert_close(fisher_diagonal(model, data), oracle(model, data))
    possible = lambda o, t: [(w, y) for w, y in all_labels(o, t) if w > 0]  # noqa: E731
    assert_close(fisher_diagonal(model, data, kind="exact"), oracle(model, data, labels=possible))


def test_bernoulli():
    model, data = coin_model(), coins((3, 2))
    assert_close(fisher_diagonal(model, data, loss="bernoulli"), oracle(model, data, bernoulli))
    exact = fisher_diagonal(model, data, kind="exact", loss="bernoulli")
    assert_close(exact, oracle(model, data, bernoulli, all_bits))


def test_bernoulli_of_one_logit_with_flat_integer_targets():
    model, data = randomise(nn.Linear(3, 1)), batches(floats(3), classes=2)
    expected = oracle(model, [(x, y.double()[:, None]) for x, y in data], bernoulli)
    assert_close(fisher_diagonal(model, data, loss="bernoulli"), expected)


@pytest.mark.parametrize(
    ("build", "loss", "data"),
    [
        (classifier, "cross_entropy", lambda: batches(floats(3))),
        (tagger, "cross_entropy", lambda: batches(floats(2, 3), classes=3, positions=(2,))),
        (coin_model, "bernoulli", lambda: coins((3, 2))),
    ],
)
def test_sampled(build, loss, data):
    """Squared derivatives along the drawn directions, for layers with and without a rule."""
    model, data = build(), data()
    found = fisher_diagonal(model, data, kind="sampled", loss=loss, seed=3)
    assert_close(fisher_diagonal(model, data, kind="sampled", loss=loss, seed=3), found)
    generator = torch.Generator().manual_seed(3)
    drawn = [(x, draw_directions(model(x), y, loss, generator)) for x, y in data]
    expected = oracle(model, drawn, lambda outputs, v: (outputs * v).sum())
    assert_close(found, expected)
    other = fisher_diagonal(model, data, kind="sampled", loss=loss, seed=4)
    assert any(not torch.equal(found[name], other[name]) for name in found)


@pytest.mark.parametrize("loss", ["cross_entropy", "bernoulli"])
def test_mean_of_sampled_approaches_exact(loss):
    model = randomise(nn.Linear(3, 3))
    x, y = floats(3)(1).expand(4000, 3), torch.zeros(4000, dtype=torch.long)
    y = torch.zeros(4000, 3) if loss == "bernoulli" else y
    exact = fisher_diagonal(model, [(x, y)], kind="exact", loss=loss)
    sampled = fisher_diagonal(model, [(x, y)], kind="sampled", loss=loss)
    assert_close(sampled, exact, 0.1)


def test_directions_have_the_covariance_of_the_scores():
    """Over all signs: the mean of v vᵀ is that of the scores of the labels, as is that of v."""
    p = torch.tensor([0.9, 0.07, 0.03, 0.0], dtype=torch.float64)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64)
    found = direction(p.expand(16, 4), signs)
    scores = torch.eye(4, dtype=torch.float64) - p  # of each label
    expected = torch.einsum("y,ya,yb->ab", p, scores, scores)
    assert torch.allclose(found.T @ found / 16, expected, atol=1e-15)
    assert found.mean(0).abs().max() < 1e-15


@pytest.mark.parametrize("layout", ["sequence", "language"])
def test_directions_at_ignored_positions_and_at_impossible_classes(layout):
    logits, targets = torch.randn(2, 3, 4), torch.zeros(2, 4, dtype=torch.long)
    targets[0, 1] = targets[1] = IGNORED
    logits[:, 2] = -torch.inf
    if layout == "language":
        logits = logits.mT
    v = draw_directions(logits, targets, "cross_entropy", torch.Generator())
    assert v.shape == logits.shape
    v = v.mT if layout == "language" else v
    assert torch.equal((v == 0).all(1), targets == IGNORED)
    assert (v[:, 2] == 0).all()
    assert v.sum(1).abs().max() < 1e-6  # a direction in which probabilities change


def test_sampled_is_even_for_a_network_that_is_sure():
    """A label drawn from it would be the likely one each time, with next to no gradient."""
    model = randomise(nn.Linear(3, 4))
    with torch.no_grad():
        model.bias[0] += 15.0
    data = [(floats(3)(200), torch.zeros(200, dtype=torch.long))]
    exact = fisher_diagonal(model, data, kind="exact")
    assert max(e.max() for e in exact.values()) < 1e-4
    for seed in range(3):
        found = fisher_diagonal(model, data, kind="sampled", seed=seed)
        for name, e in exact.items():
            assert torch.allclose(found[name].sum(), e.sum(), rtol=0.3)


def test_sampled_with_an_impossible_class():
    mask = torch.tensor([0.0, -torch.inf, 0.0, 0.0], dtype=torch.float64)
    model = randomise(Net(lambda m, x: m.fc(x) + mask, fc=nn.Linear(3, CLASSES)))
    data = [(floats(3)(3), torch.tensor([0, 2, 3]))]
    found = fisher_diagonal(model, data, kind="sampled")
    assert all(value.isfinite().all() for value in found.values())
    assert found["fc.weight"][1].abs().max() == 0
    assert found["fc.weight"][0].min() > 0
