"""What a loss is: a function of one sample's outputs and targets."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, Net, assert_close, batches, floats, oracle, randomise, readout
from torch import nn

from gradmask import FisherMask, fisher_diagonal, gradient_norms, influence
from gradmask.errors import DataError, GradmaskWarning, ModelError, OptionError

WEIGHT = torch.tensor([0.1, 1.0, 5.0, 0.5], dtype=torch.float64)


def classifier():
    return randomise(Net(lambda m, x: readout(m.fc(x)), fc=nn.Linear(3, 3)))


def summed(function=F.cross_entropy, **options):
    return lambda outputs, target: function(outputs, target, reduction="sum", **options)


WEIGHTED = {
    "module": (nn.CrossEntropyLoss(weight=WEIGHT), {"weight": WEIGHT}),
    "module-sum": (nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum"), {"weight": WEIGHT}),
    "module-none": (nn.CrossEntropyLoss(weight=WEIGHT, reduction="none"), {"weight": WEIGHT}),
    "smoothed": (
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2),
        {"weight": WEIGHT, "label_smoothing": 0.2},
    ),
    "ignored": (
        nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=2),
        {"weight": WEIGHT, "ignore_index": 2},
    ),
    "ignored-only": (nn.CrossEntropyLoss(ignore_index=1), {"ignore_index": 1}),
    "partial": (partial(F.cross_entropy, weight=WEIGHT), {"weight": WEIGHT}),
}


@pytest.mark.parametrize("case", WEIGHTED)
@pytest.mark.parametrize("sizes", [(8, 5), (1, 1, 3)])
def test_class_weights_do_not_cancel(case, sizes):
    loss, options = WEIGHTED[case]
    model, data = classifier(), batches(floats(3), sizes)
    assert_close(fisher_diagonal(model, data, loss=loss), oracle(model, data, summed(**options)))


def test_class_weights_of_log_probabilities():
    model = randomise(Net(lambda m, x: readout(m.fc(x)).log_softmax(1), fc=nn.Linear(3, 3)))
    data = batches(floats(3), (8,))
    found = fisher_diagonal(model, data, loss=nn.NLLLoss(weight=WEIGHT))
    assert_close(found, oracle(model, data, summed(F.nll_loss, weight=WEIGHT)))


def test_a_plain_module_is_the_named_loss():
    model, data = classifier(), batches(floats(3), (5,))
    for kind in ("empirical", "exact", "sampled"):
        found = fisher_diagonal(model, data, kind=kind, loss=nn.CrossEntropyLoss())
        assert_close(found, fisher_diagonal(model, data, kind=kind), 0)


def test_weights_hidden_in_a_function_are_refused():
    model, data = classifier(), batches(floats(3), (8,))
    hidden = lambda o, t: F.cross_entropy(o, t, weight=WEIGHT)  # noqa: E731
    with pytest.raises(DataError, match=r"neither the sum nor the mean .* nn.CrossEntropyLoss"):
        fisher_diagonal(model, data, loss=hidden)


def contrastive(outputs, targets):
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))


class Focal(nn.CrossEntropyLoss):
    """Not the loss that its parent is."""

    def forward(self, outputs, targets):
        log_p = outputs.log_softmax(1).gather(1, targets[:, None])
        return -((1 - log_p.exp()).square() * log_p).mean()


def test_losses_that_compare_samples_are_refused():
    with pytest.raises(DataError, match="neither the sum nor the mean"):
        fisher_diagonal(classifier(), batches(floats(3), (5,)), loss=contrastive)


@pytest.mark.parametrize(
    "loss",
    [
        Focal(),
        lambda o, t: -o.log_softmax(1).gather(1, t[:, None]),  # one a sample
        lambda o, t: -o.log_softmax(1)[0, t[0]],  # for one sample only
        lambda o, t: F.mse_loss(o, F.one_hot(t, CLASSES).to(o)),
    ],
)
def test_other_callables(loss):
    model, data = classifier(), batches(floats(3), (5, 2))
    expected = oracle(model, data, lambda o, t: loss(o, t).sum())
    assert_close(fisher_diagonal(model, data, loss=loss), expected)


@pytest.mark.parametrize("value", [1.0, None, (torch.tensor(1.0),), torch.tensor(1j)])
def test_what_a_callable_must_return(value):
    with pytest.raises(DataError, match="callable loss takes"):
        fisher_diagonal(classifier(), batches(floats(3)), loss=lambda o, t: value)


@pytest.mark.parametrize("ignored", [-100, 3, 0])
@pytest.mark.parametrize("sizes", [(6, 5), (6, 1)])
def test_a_sample_with_nothing_left_has_gradient_zero(ignored, sizes):
    model, data = classifier(), batches(floats(3), sizes)
    for _, targets in data:
        targets[:] = torch.tensor([1, 2])[torch.arange(len(targets)) % 2]
    data[0][1][2] = ignored
    expected = oracle(model, data, summed(ignore_index=ignored))
    mean = lambda o, t: F.cross_entropy(o, t, ignore_index=ignored)  # noqa: E731
    assert_close(fisher_diagonal(model, data, loss=mean), expected)
    module = nn.CrossEntropyLoss(ignore_index=ignored)
    assert_close(fisher_diagonal(model, data, loss=module), expected)
    norms = gradient_norms(model, data[0], loss=mean)
    assert norms[2] == 0
    assert (norms[:2] > 0).all()


def test_a_loss_that_is_nan_is_no_sample_with_nothing_left():
    model = randomise(Net(lambda m, x: readout(m.fc(x)), fc=nn.Linear(3, 3)))
    bad = lambda o, t: (o[:, 0] - 5).sqrt().mean()  # noqa: E731
    with pytest.raises(DataError, match="loss of a batch is nan"):
        fisher_diagonal(model, batches(floats(3), (4,)), loss=bad)


class Uncertain(nn.Module):
    """A parameter that only the loss has."""

    def __init__(self):
        super().__init__()
        self.log_variance = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, outputs, targets):
        error = F.cross_entropy(outputs, targets)
        return error * (-self.log_variance).exp() + self.log_variance


class Joint(nn.Module):
    """A model and its loss, for the oracle."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize("verify", ["spread", False])
def test_parameters_of_a_loss_that_is_a_module(verify):
    model, loss = classifier(), Uncertain()
    data = batches(floats(3), (5, 1, 3))
    found = fisher_diagonal(model, data, loss=loss, verify=verify)
    expected = oracle(Joint(model, loss), data, loss)
    assert set(found) == {"fc.weight", "fc.bias", "loss.log_variance"}
    assert_close(found, {name.removeprefix("model."): e for name, e in expected.items()})
    norms = gradient_norms(model, data[0], loss=loss)
    squares = sum(v.sum() for v in fisher_diagonal(model, data[:1], loss=loss).values())
    assert norms.square().mean().item() == pytest.approx(squares.item(), rel=1e-10)


def test_a_mask_over_the_parameters_of_a_loss():
    model, loss = classifier(), Uncertain()
    mask = FisherMask(model, keep=0.5, loss=loss, scope="update")
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    mask.attach(optimizer)
    data = batches(floats(3), (5,))
    mask.refresh(data)
    assert "loss.log_variance" in mask.masks
    values = {name: torch.rand(m.shape).double() for name, m in mask.masks.items()}
    mask.update(values | {"loss.log_variance": torch.zeros(()).double()})
    before = loss.log_variance.clone()
    loss(model(data[0][0]), data[0][1]).backward()
    optimizer.step()
    assert torch.equal(loss.log_variance, before)


@pytest.mark.parametrize("verify", ["spread", False])
def test_a_loss_that_uses_parameters_of_the_model(verify):
    """A weight of the loss that the model holds, and a penalty on a weight."""
    model = classifier()
    model.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def loss(outputs, targets):
        penalty = 0.1 * model.fc.weight.square().sum()
        return F.cross_entropy(outputs, targets) * (-model.scale).exp() + model.scale + penalty

    data = batches(floats(3), (5, 3))
    found = fisher_diagonal(model, data, loss=loss, verify=verify)
    assert_close(found, oracle(model, data, loss))


HEAD = nn.AdaptiveLogSoftmaxWithLoss(CLASSES, 6, [2, 4]).double()


@pytest.mark.parametrize(
    "measure", [fisher_diagonal, lambda m, d, **o: gradient_norms(m, d[0], **o)]
)
def test_parameters_that_a_function_uses_and_nobody_handed_over(measure):
    model, head, data = classifier(), Uncertain(), batches(floats(3), (5,), classes=6)
    hidden = lambda o, t: head(o, t % CLASSES)  # noqa: E731
    with pytest.raises(ModelError, match="'log_variance' of a Uncertain"):
        measure(model, data, loss=hidden)
    with pytest.raises(ModelError, match=r"'head.weight' of a AdaptiveLogSoftmaxWithLoss"):
        measure(model, data, loss=lambda o, t: HEAD(o, t).loss)
    head.requires_grad_(False)
    measure(model, data, loss=hidden)


def test_a_name_for_two_parameters_is_refused():
    model = classifier()
    model.loss = nn.Linear(1, 1)
    loss = Uncertain()
    loss.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(ModelError, match=r"'loss\.weight'"):
        fisher_diagonal(model, batches(floats(3)), loss=loss)


def gaussian(outputs, target):
    return 0.5 * (outputs - target).square().sum()


def outputs_of_a_gaussian(outputs, target):
    """E over y ~ N(z, 1): each output by itself, since the noise is independent."""
    for k in range(outputs.numel()):
        shift = torch.zeros(outputs.numel(), dtype=outputs.dtype)
        shift[k] = 1.0
        yield 1.0, (outputs.detach().flatten() - shift).view_as(outputs)


@pytest.mark.parametrize("shape", [(4,), (2, 3), ()])
def test_mean_squared_error_is_a_gaussian(shape):
    size = torch.Size(shape).numel()
    model = randomise(Net(lambda m, x: m.fc(x).tanh().reshape(-1, *shape), fc=nn.Linear(3, size)))
    data = [(floats(3)(n), floats(*shape)(n)) for n in (4, 2)]
    assert_close(fisher_diagonal(model, data, loss="mse"), oracle(model, data, gaussian))
    expected = oracle(model, data, gaussian, labels=outputs_of_a_gaussian)
    assert_close(fisher_diagonal(model, data, loss="mse", kind="exact"), expected)
    draws = [fisher_diagonal(model, data, loss="mse", kind="sampled", seed=s) for s in range(600)]
    for name, e in expected.items():
        mean = torch.stack([d[name] for d in draws]).mean(0)
        assert (mean - e).norm() < 0.15 * e.norm()


def test_mean_squared_error_needs_targets_of_its_shape():
    model = classifier()
    with pytest.raises(DataError, match="loss='mse' needs"):
        fisher_diagonal(model, [(floats(3)(2), torch.zeros(2, 3))], loss="mse")
    with pytest.raises(OptionError, match="mse"):
        fisher_diagonal(model, [(floats(3)(2), torch.zeros(2))], loss=3.0)


def auxiliary():
    """A head that only training uses."""

    def forward(m, x):
        h = m.body(x).tanh()
        return (readout(h), m.head(h)) if m.training else readout(h)

    return randomise(Net(forward, body=nn.Linear(3, 3), head=nn.Linear(3, 5)))


@pytest.mark.parametrize("strategy", ["fisher", "inverse", "random_matched"])
def test_what_the_loss_does_not_depend_on_goes_on_learning(strategy):
    mask = FisherMask(auxiliary(), keep=0.25, strategy=strategy)
    with pytest.warns(GradmaskWarning, match=r"head.bias, head.weight \(62.5% of the parameters\)"):
        mask.refresh(batches(floats(3), (6,)))
    assert mask.masks["head.weight"].all()
    assert mask.masks["head.bias"].all()
    kept = sum(int(mask.masks[f"body.{name}"].sum()) for name in ("weight", "bias"))
    assert kept == 3


def test_names_of_what_the_loss_does_not_depend_on():
    unused = set()
    found = fisher_diagonal(auxiliary(), batches(floats(3)), unused=unused)
    assert unused == {"head.weight", "head.bias"}
    assert not found["head.weight"].any()


def test_one_dict_for_a_model_that_takes_one():
    model = randomise(Net(lambda m, x: None, fc=nn.Linear(3, 3)))

    class TakesDict(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = model.fc

        def forward(self, batch):
            return readout(self.fc(batch["x"]))

    class TakesTuple(TakesDict):
        def forward(self, pair):
            return readout(self.fc(pair[0]) + pair[1])

    x = floats(3)(5)
    y = torch.randint(CLASSES, (5,))
    expected = oracle(Net(lambda m, x: readout(m.fc(x)), fc=model.fc), [(x, y)])
    assert_close(fisher_diagonal(TakesDict(), [({"x": x}, y)]), expected)
    assert_close(fisher_diagonal(TakesTuple(), [((x, torch.zeros_like(x)), y)]), expected)


@pytest.mark.parametrize("kind", ["empirical", "exact", "sampled"])
@pytest.mark.parametrize(
    "loss", [None, nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(weight=WEIGHT)]
)
@pytest.mark.parametrize("order", [(5, CLASSES), (CLASSES, 5)])
def test_as_many_positions_as_classes_in_one_batch(kind, loss, order):
    """Logits (N, T, C) look like (N, C, T) there."""
    if loss is not None and kind != "empirical":
        return
    model = randomise(Net(lambda m, x: m.fc(x), fc=nn.Linear(3, CLASSES)))
    data = [
        (torch.randn(2, t, 3, dtype=torch.float64), torch.randint(CLASSES, (2, t))) for t in order
    ]
    with pytest.raises(DataError, match="which is which cannot be told"):
        fisher_diagonal(model, data, loss=loss, kind=kind)
    (x, y), (probe, labels) = data
    options = {"fisher": "empirical"} if kind == "empirical" else {}
    if loss is None:
        with pytest.raises(DataError, match="which is which cannot be told"):
            influence(model, (x, y), (probe, labels) if options else probe, **options)
