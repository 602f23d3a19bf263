"""The pass checks itself: what a model, loss or loader does is not believed."""

import logging

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CLASSES,
    Net,
    all_labels,
    assert_close,
    batches,
    floats,
    oracle,
    randomise,
    readout,
    stack,
)
from torch import nn

from gradmask import fisher_diagonal
from gradmask.errors import DataError, ModelError, OptionError
from gradmask.fisher import batch, linear, losses, rules
from gradmask.fisher.operations import Layout
from gradmask.fisher.verify import Schedule


@pytest.fixture
def failed(caplog):
    """Messages of failed checks."""
    caplog.set_level(logging.WARNING, "gradmask")
    return lambda: [r.getMessage() for r in caplog.records if "check" in r.getMessage()]


def bags(m, x, n):
    """Bags of different sizes in one layer, cut apart afterwards."""
    n = n.tolist()
    rows = m.fc(torch.cat([b[:k] for b, k in zip(x, n, strict=True)])).tanh()
    return readout(torch.stack([r.mean(0) for r in rows.split(n)]))


def bag_data(*sizes):
    return [
        ((floats(7, 5)(len(s)), torch.tensor(s)), torch.arange(len(s)) % CLASSES) for s in sizes
    ]


@pytest.mark.parametrize(
    "sizes",
    [
        ([3, 3, 1, 5],),
        ([3, 3, 3, 3], [1, 5, 3, 3]),
        ([2, 2], [2, 2], [2, 2], [3, 1]),
        ([1, 1, 2, 4], [4, 4, 4, 4]),
    ],
)
@pytest.mark.parametrize("product", [False, True])
def test_bags_of_different_sizes(sizes, product):
    model = Net(bags, fc=nn.Linear(5, 3))
    if product:
        model.fc = Net(lambda m, x: x @ m.p, p=nn.Parameter(torch.randn(5, 3)))
    randomise(model)
    data = bag_data(*sizes)
    assert_close(fisher_diagonal(model, data), oracle(model, data))


def positions_first(layout, t):
    """Rows of samples taken for rows of positions."""
    return t.unflatten(0, (-1, layout.samples)).movedim(1, 0)


def broken_rule(monkeypatch, **change):
    found = rules._RULES[nn.Linear]
    monkeypatch.setitem(rules._RULES, nn.Linear, found.__class__(**{**vars(found), **change}))


def square_of_the_sum(module, x, g, totals):
    """The mistake of many: the batch's gradient, squared."""
    gradients = {"weight": g.flatten(0, -2).mT @ x.flatten(0, -2), "bias": g.flatten(0, -2).sum(0)}
    for name in totals:
        totals[name] += gradients[name].square()


def squares_of_positions(module, x, g, totals):
    """Squared first, summed over positions after."""
    g, x = g.flatten(0, -2), x.flatten(0, -2)
    squares = {"weight": g.square().mT @ x.square(), "bias": g.square().sum(0)}
    for name in totals:
        totals[name] += squares[name]


def twice_the_bias(module, x, g, totals):
    linear._add_linear_squares(module, x, g, totals)
    if "bias" in totals:
        totals["bias"] += g.flatten(1, -2).sum(1).square().sum(0)


def doubled_weight(module, x, g):
    found = linear.linear(module, x, g)
    return {name: 2 * t if name == "weight" else t for name, t in found.items()}


def mean_of_the_batch(outputs, targets, loss):
    return loss(outputs, targets), frozenset()


def other_targets(outputs, targets, loss):
    return loss(outputs.roll(1, 0), targets) * len(targets), frozenset()


def scaled(receive):
    return lambda self, calls, g: receive(self, calls, g if g is None else 1.1 * g)


def break_layout(m):
    m.setattr(batch.Capture, "mixed", lambda self, outputs: set())
    m.setattr(Layout, "samples_first", positions_first)


BREAKS = {
    "square-of-sum": lambda m: broken_rule(m, add_squares=square_of_the_sum),
    "squares-of-positions": lambda m: broken_rule(m, add_squares=squares_of_positions),
    "twice": lambda m: broken_rule(m, add_squares=twice_the_bias),
    "per-sample": lambda m: broken_rule(m, add_squares=None, per_sample=doubled_weight),
    "layout": break_layout,
    "loss-mean": lambda m: m.setattr(losses, "_sample_by_sample", mean_of_the_batch),
    "loss-rolled": lambda m: m.setattr(losses, "_sample_by_sample", other_targets),
    "chain": lambda m: m.setattr(batch.Capture, "_receive", scaled(batch.Capture._receive)),
}


def network():
    """Layers with rules over positions, a matrix product in rows, a scale."""
    return Net(
        lambda m, x: readout((m.b(m.a(x).tanh()).flatten(0, 1) @ m.p).view(len(x), -1)),
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 3),
        p=nn.Parameter(torch.randn(3, 2)),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", BREAKS)
def test_what_is_broken_is_caught(case, dtype, monkeypatch, failed):
    """Each alone, in an ordinary pass; without the check the numbers are wrong."""
    model = randomise(network(), dtype)
    data = [(x.to(dtype), y) for x, y in batches(floats(4, 3), (8, 8, 8))]
    expected = oracle(model, data)
    BREAKS[case](monkeypatch)
    options = {"loss": F.cross_entropy} if case.startswith("loss") else {}
    wrong = fisher_diagonal(model, data, verify=False, **options)
    with pytest.raises(AssertionError):
        assert_close(wrong, expected, 1e-3)
    assert not failed()
    found = fisher_diagonal(model, data, **options)
    assert_close(found, expected, 1e-10 if dtype == torch.float64 else 1e-4)
    assert failed()


def late(m, x):
    """The layer's gradient is doubled in batches with a negative first entry only."""
    h = m.fc(x)
    return readout(2 * h - h.detach() if len(x) > 1 and x[0, 0] < 0 else h)


def late_data(bad=2, count=4):
    data = batches(floats(3), (5,) * count)
    for number, (x, _) in enumerate(data):
        x[:, 0] = x[:, 0].abs() * (-1 if number == bad else 1)
    return data


@pytest.mark.parametrize("bad", [0, 1, 2, 3])
def test_no_wrong_summand_remains(bad, failed):
    """In one batch the gradients depend on the company: everything is measured again."""
    model = randomise(Net(late, fc=nn.Linear(3, 3)))
    data = late_data(bad)
    assert_close(fisher_diagonal(model, data), oracle(model, data))
    assert failed()


def test_data_that_can_be_read_once():
    model, data = randomise(Net(late, fc=nn.Linear(3, 3))), late_data()
    with pytest.raises(DataError, match=r"After 10 samples .* can be read only once"):
        fisher_diagonal(model, iter(data))
    data = late_data(bad=0)
    assert_close(fisher_diagonal(model, iter(data)), oracle(model, data))


def test_every_sample_on_request():
    """One sample of the second batch in nine is wrong: `all` finds it."""

    def forward(m, x):
        h = m.fc(x)
        odd = (x[:, :1] < -3.5) & (len(x) > 1)
        return readout(torch.where(odd, 2 * h - h.detach(), h))

    model = randomise(Net(forward, fc=nn.Linear(3, 3)))
    data = batches(floats(3), (9, 9, 9))
    data[1][0][4, 0] = -4.0
    expected = oracle(model, data)
    assert_close(fisher_diagonal(model, data, verify="all"), expected)
    with pytest.raises(AssertionError):
        assert_close(fisher_diagonal(model, data, verify=False), expected)


@pytest.mark.parametrize("verify", ["all", "spread"])
@pytest.mark.parametrize("kind", ["empirical", "sampled", "exact"])
def test_a_sound_pass_is_not_suspected(kind, verify, failed):
    for dtype in (torch.float64, torch.float32):
        model = randomise(network(), dtype)
        data = [(x.to(dtype), y) for x, y in batches(floats(4, 3), (4, 3, 1))]
        found = fisher_diagonal(model, data, kind=kind, verify=verify)
        assert_close(found, fisher_diagonal(model, data, kind=kind, verify=False), 0)
    assert not failed()


def test_gradients_that_cancel_are_not_suspected(failed):
    """The bias before a normalisation, and of the keys in attention: zero but for rounding."""

    def forward(m, x):
        h = m.attend(m.fc(x), m.fc(x), m.fc(x), need_weights=False)[0]
        return readout(m.norm(m.out(h)))

    model = Net(
        forward,
        fc=nn.Linear(8, 8),
        attend=nn.MultiheadAttention(8, 2, batch_first=True),
        out=nn.Linear(8, 8),
        norm=nn.GroupNorm(1, 4),
    )
    model = randomise(model, torch.float32)
    fisher_diagonal(model, [(torch.randn(8, 4, 8), torch.arange(8) % CLASSES)] * 3)
    assert not failed()


def test_a_model_that_takes_no_batch_of_one(failed):
    model = randomise(Net(lambda m, x: readout(m.fc(x)).squeeze(), fc=nn.Linear(3, 3)))
    data = batches(floats(3), (4, 2))
    expected = oracle(randomise_like(model), data)
    assert_close(fisher_diagonal(model, data), expected)
    assert not failed()


def randomise_like(model):
    """The same model without the squeeze."""
    return Net(lambda m, x: readout(m.fc(x)), fc=model.fc)


def time_first(m, x):
    """A recurrent network of which dimension 0 is time."""
    return m.out(m.rnn(x)[0])


def recurrent():
    return randomise(Net(time_first, rnn=nn.LSTM(3, 4), out=nn.Linear(4, CLASSES)))


def test_samples_that_depend_on_others_are_refused():
    """A mean over the batch of what has no gradient is not seen by any backward pass."""
    model = randomise(Net(lambda m, x: readout(m.fc(x - 0.5 * x.mean(0))), fc=nn.Linear(3, 3)))
    with pytest.raises(ModelError, match=r"depends on the others.*batch_first=False"):
        fisher_diagonal(model, batches(floats(3), (4, 3)))
    single = batches(floats(3), (1, 1, 1))  # as the message says
    assert_close(fisher_diagonal(model, single), oracle(model, single))


class Hiding(nn.Module):
    """One logit is −∞, whatever the inputs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).masked_fill(torch.arange(CLASSES) == 3, -torch.inf)


def test_infinite_logits_hide_nothing():
    model = randomise(Net(lambda m, x: readout(m.fc(x - 0.5 * x.mean(0))), fc=nn.Linear(3, 3)))
    data = [(x, y % 3) for x, y in batches(floats(3), (4, 3))]
    with pytest.raises(ModelError, match="depends on the others"):
        fisher_diagonal(Hiding(model), data)
    independent = Hiding(randomise(Net(lambda m, x: readout(m.fc(x)), fc=nn.Linear(3, 3))))
    assert_close(fisher_diagonal(independent, data), oracle(independent, data))


@pytest.mark.parametrize("loss", [nn.MSELoss(), "mse"])
def test_as_many_steps_as_samples_hide_nothing(loss):
    """One step of all samples gives outputs of as many rows as the batch does."""
    model = randomise(
        Net(lambda m, x: m.out(m.rnn(x)[0][-1]), rnn=nn.GRU(3, 4), out=nn.Linear(4, 2))
    )
    data = [(torch.randn(4, 4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64))]
    with pytest.raises((ModelError, DataError), match=r"depends on the others|samples"):
        fisher_diagonal(model, data, loss=loss, verify="all")


def test_outputs_that_cancel_are_no_mixing():
    """Zero but for rounding, which differs from batch to batch, beside the logits."""

    def forward(m, x):
        turned = x @ m.q @ m.q.T
        return readout(x / m.p), turned - x

    q = torch.linalg.qr(torch.randn(3, 3))[0]
    model = Net(forward, p=nn.Parameter(torch.rand(3) + 1.0), q=nn.Parameter(q))
    data = [(x.float(), y) for x, y in batches(floats(4, 3), (8, 8))]
    found = fisher_diagonal(model, data, loss=lambda out, y: F.cross_entropy(out[0], y))
    assert found["p"].isfinite().all()


@pytest.mark.parametrize("verify", ["spread", False])
def test_time_in_dimension_0_is_refused(verify):
    """Steps of a sequence are no samples; the same data with samples first are right."""
    x, y = torch.randn(6, 5, 3, dtype=torch.float64), torch.randint(CLASSES, (6, 5))
    turned = [(x, y.T.contiguous().T)]
    with pytest.raises(ModelError, match=r"depends on the others.*batch_first=False"):
        fisher_diagonal(Net(lambda m, x: m.inner(x).mT, inner=recurrent()), turned, verify=verify)
    model = Net(lambda m, x: m.inner(x.transpose(0, 1)).permute(1, 2, 0), inner=recurrent())
    data = [(x.transpose(0, 1), y.T)]
    assert_close(fisher_diagonal(model, data, verify=verify), oracle(model, data))


def test_exact_with_a_failed_check():
    model = randomise(Net(late, fc=nn.Linear(3, 3)))
    data = late_data()
    expected = oracle(model, data, labels=all_labels)
    assert_close(fisher_diagonal(model, data, kind="exact"), expected)


@pytest.mark.parametrize("verify", [True, "none", None, 1])
def test_unknown_verify(verify):
    with pytest.raises(OptionError, match="verify="):
        fisher_diagonal(stack(nn.Linear(3, 3)), batches(floats(3)), verify=verify)


def checks(schedule, kinds, samples=8):
    return [n for n, kind in enumerate(kinds, 1) if schedule.check(*kind, samples) is not None]


def test_when_batches_are_checked():
    schedule = Schedule("spread", [])
    assert checks(schedule, [("a", "s")] * 100) == [1, 9, 81]
    schedule = Schedule("spread", [])
    assert checks(schedule, [("a", n) for n in range(20)]) == [1, 2, 3, 5, 9, 17]
    schedule = Schedule("spread", [])
    assert checks(schedule, [(n // 2, "s") for n in range(8)]) == [1, 3, 5, 7]
    schedule = Schedule("spread", ["never seen"])
    assert checks(schedule, [("a", "s")] * 20) == [1, 2, 4, 8, 9, 16]
    assert checks(Schedule(False, []), [("a", "s")] * 9) == []
    assert checks(Schedule("all", []), [("a", "s")] * 3) == [1, 2, 3]


def test_two_samples_first_then_one():
    schedule = Schedule("spread", [])
    found = [schedule.check("a", "s", 8) for _ in range(9)]
    rows = [range(8)[check.rows] for check in found if check]
    assert [len(r) for r in rows] == [2, 1]
