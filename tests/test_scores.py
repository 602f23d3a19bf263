"""Every score of the registry against single samples, and the masks that are made of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from scored import data_of, gradients, network, samples, train

import gradmask
from gradmask import SCORES, FisherMask, parameter_scores, register_score
from gradmask.errors import DataError, GradmaskWarning, OptionError, StateError
from gradmask.scores import quotient

# Written anew, from the formulas.
REFERENCE = {
    "fisher": lambda g, w, old: (g**2).mean(0),
    "signal_to_noise": lambda g, w, old: g.mean(0) ** 2 / g.var(0, correction=0),
    "saliency": lambda g, w, old: g.mean(0).abs(),
    "snip": lambda g, w, old: (g.mean(0) * w).abs(),
    "fisher_weight": lambda g, w, old: (g**2).mean(0) * w**2,
    "magnitude": lambda g, w, old: w.abs(),
    "gradient_to_weight": lambda g, w, old: g.mean(0).abs() / w.abs(),
    "ratio": lambda g, w, old: (g**2).mean(0) / (old**2).mean(0),
}


def test_all_scores_have_a_reference_and_words():
    assert SCORES.keys() == {*REFERENCE, "random"}
    for score in SCORES.values():
        assert score.formula
        assert score.cost
        assert score.source or score.name == "random"


@pytest.mark.parametrize("name", REFERENCE)
def test_scores_are_those_of_single_samples(name):
    model = network()
    loader, options = data_of(name)
    found = parameter_scores(model, loader, name, **options)
    new, old = gradients(model, samples(1)), gradients(model, samples(2))
    for key, weight in model.named_parameters():
        expected = REFERENCE[name](new[key], weight.detach(), old[key])
        expected = torch.where(expected.isnan(), 0.0, expected)  # 0 / 0, of what is dead
        torch.testing.assert_close(found[key], expected, rtol=1e-9, atol=0)
        assert not found[key].requires_grad


@pytest.mark.parametrize("which", ["highest", "lowest"])
@pytest.mark.parametrize("per", ["network", "tensor"])
@pytest.mark.parametrize("name", SCORES)
def test_masks_keep_the_share_at_the_asked_end(name, per, which):
    model = network()
    loader, options = data_of(name)
    mask = FisherMask(model, keep=0.25, score=name, per=per, which=which)
    mask.refresh(loader, **options)
    values = parameter_scores(model, loader, name, seed=mask_seed(mask), **options)
    assert mask.kept_fraction == pytest.approx(0.25, abs=0.03)
    groups = [list(values)] if per == "network" else [[key] for key in values]
    for keys in groups:
        kept = torch.cat([values[k][mask.masks[k]] for k in keys])
        other = torch.cat([values[k][~mask.masks[k]] for k in keys])
        assert kept.numel()
        assert kept.min() >= other.max() if which == "highest" else kept.max() <= other.min()


def mask_seed(mask):
    """The seed of the first refresh's draws."""
    return gradmask.seeding.derive_seed(mask.seed, "fisher", 0)


@pytest.mark.parametrize("strategy", ["random", "random_matched", "inverse"])
@pytest.mark.parametrize("name", SCORES)
def test_controls_beside_every_score(name, strategy):
    loader, options = data_of(name)
    chosen = FisherMask(network(), keep=0.3, score=name)
    control = FisherMask(network(), keep=0.3, score=name, strategy=strategy)
    for mask in (chosen, control):
        mask.refresh(loader, **options)
    assert control.kept_fraction == pytest.approx(0.3, abs=0.03)
    assert any((control.masks[k] != m).any() for k, m in chosen.masks.items())
    if strategy == "random_matched":
        assert control.kept_fractions == chosen.kept_fractions


@pytest.mark.parametrize("name", SCORES)
def test_states_and_files_go_on(name, tmp_path):
    loader, options = data_of(name)
    model = network()
    mask = FisherMask(model, keep=0.3, score=name, average=0.5)
    mask.refresh(loader, **options)
    mask.save(tmp_path / "mask.safetensors")
    state = copy.deepcopy(mask.state_dict())
    train(model)
    mask.refresh(loader, **options)
    for load in (
        lambda m: m.load(tmp_path / "mask.safetensors"),
        lambda m: m.load_state_dict(state),
    ):
        other = FisherMask(model, keep=0.3, score=name, average=0.5)
        load(other)
        other.refresh(loader, **options)
        assert other.sha256() == mask.sha256()
        assert all(torch.equal(other.masks[k], m) for k, m in mask.masks.items())
    with pytest.raises(StateError, match=r"average|score"):
        FisherMask(model, keep=0.3).load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_a_quotient_with_nothing_below_is_chosen_by_what_is_above(dtype, size):
    above = torch.rand(1000, dtype=dtype, generator=torch.Generator().manual_seed(0)) * size
    below = torch.where(torch.arange(1000) < 600, 0.0, 1e-6).to(dtype)
    found = quotient(above, below)
    assert found.isfinite().all()
    assert found[:600].min() > found[600:].max()
    assert torch.equal(found[:600].argsort(), above[:600].argsort())
    assert not quotient(torch.zeros(3, dtype=dtype), torch.tensor([0.0, 1.0, 2.0])).any()
    masks = gradmask.make_masks({"a": found}, 0.1)
    assert int(masks["a"].sum()) == 100


@pytest.mark.parametrize("name", ["ratio", "gradient_to_weight"])
def test_keep_is_kept_where_denominators_are_zero(name):
    model = network().float()
    with torch.no_grad():
        model[0].weight[:, 1] = 0
    old = [(x.float() * torch.tensor([1.0, 0.0])[:, None, None], y) for x, y in samples(2)]
    options = {"protect": old} if name == "ratio" else {}
    mask = FisherMask(model, keep=0.1, score=name, per="network")
    mask.refresh([(x.float(), y) for x, y in samples(1)], **options)
    assert mask.kept_fraction == pytest.approx(0.1, abs=0.02)
    assert not mask.masks["3.weight"].any()
    assert mask.masks["0.weight"][:, 1].sum() >= 12


def test_what_the_protected_data_need_least_learns():
    model, old = network(), samples(2)
    mask = FisherMask(model, keep=0.3, which="lowest")
    mask.refresh(samples(1), protect=old)
    alone = FisherMask(model, keep=0.3, which="lowest")
    alone.refresh(old)
    inverse = FisherMask(model, keep=0.3, strategy="inverse")
    inverse.refresh(protect=old)
    for other in (alone, inverse):
        assert all(torch.equal(mask.masks[k], m) for k, m in other.masks.items())


@pytest.mark.parametrize(
    ("options", "arguments", "words"),
    [
        ({}, {"protect": samples(2)}, "which='lowest'"),
        ({"score": "ratio"}, {"loader": samples(1)}, "protect="),
        ({"score": "ratio"}, {"protect": samples(1)}, "two data sets"),
        ({"score": "ratio"}, {}, "two data sets"),
        ({"score": "magnitude", "which": "lowest"}, {"protect": samples(1)}, "reads no data"),
        ({"score": "snip"}, {}, "loader"),
    ],
)
def test_data_that_are_missing_or_without_use(options, arguments, words):
    mask = FisherMask(network(), 0.3, **options)
    for call in (mask.refresh, mask.check):
        with pytest.raises(OptionError, match=words):
            call(**({"loader": None} | arguments))
    assert not mask.masks


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"score": "fischer"}, "fisher"),
        ({"score": "snip", "kind": "sampled"}, "empirical"),
        ({"score": "snip", "refresh": "online"}, "refresh"),
        ({"score": "ratio", "refresh": "online"}, "refresh"),
        ({"score": "magnitude", "refresh": "online"}, "refresh"),
    ],
)
def test_options_that_do_not_fit_the_score(options, words):
    with pytest.raises(OptionError, match=words):
        FisherMask(network(), 0.3, **options)


def test_scores_of_weights_read_no_data():
    class Unread:
        def __iter__(self):
            raise AssertionError

    for name in ("magnitude", "random"):
        mask = FisherMask(network(), 0.3, score=name)
        mask.check(Unread())
        mask.refresh(Unread())
        mask.refresh()
        assert mask.refreshes == 2


def test_random_scores_are_drawn_afresh_and_from_the_seed():
    first, second = (FisherMask(network(), 0.3, score="random", seed=1) for _ in range(2))
    first.refresh()
    second.refresh()
    before = copy.deepcopy(first.masks)
    assert all(torch.equal(second.masks[k], m) for k, m in before.items())
    first.refresh()
    assert any((first.masks[k] != m).any() for k, m in before.items())


def test_online_takes_scores_made_of_squares():
    model = network()
    mask = FisherMask(model, 0.3, score="fisher_weight", refresh="online", every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    mask.attach(optimizer)
    for inputs, targets in samples(1):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    mask.refresh()
    expected = FisherMask(model, 0.3, score="fisher_weight")
    expected.refresh(samples(1))
    assert all(torch.equal(mask.masks[k], m) for k, m in expected.masks.items())


@pytest.fixture
def own():
    @register_score("spread", formula="E[g²] - ḡ²", needs=["mean", "square"])
    def spread(measured):
        return (measured.square - measured.mean.square()).clamp_min(0)

    yield
    del SCORES["spread"]


def test_scores_of_ones_own(own):
    model = network()
    found = parameter_scores(model, samples(1), "spread")
    for name, g in gradients(model, samples(1)).items():
        torch.testing.assert_close(found[name], g.var(0, correction=0))
    FisherMask(model, 0.3, score="spread").refresh(samples(1))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fisher", {}, "already"),
        ("two words", {}, "word"),
        ("mine", {"needs": ["hessian"]}, "hessian"),
        ("mine", {"needs": "mean"}, "list"),
        ("mine", {"needs": []}, "list"),
        ("mine", {"which": "most"}, "most"),
        ("mine", {"per": "layer"}, "layer"),
    ],
)
def test_registrations_that_are_refused(name, options, words):
    with pytest.raises(OptionError, match=words):
        register_score(name, **{"formula": "?", "needs": ["mean"], **options})
    assert "mine" not in SCORES


@pytest.mark.parametrize(
    ("needs", "function", "words"),
    [
        (["square"], lambda m: m.square.sum(), "shape"),
        (["square"], lambda m: 1.0, "shape"),
        (["square"], lambda m: m.mean, "needs"),
        (["square"], lambda m: -m.square, "negative"),
        (["square"], lambda m: m.square * torch.nan, "NaN"),
    ],
)
def test_functions_that_give_no_score(needs, function, words):
    register_score("mine", formula="?", needs=needs)(function)
    try:
        mask = FisherMask(network(), 0.3, score="mine")
        with pytest.raises((DataError, OptionError), match=words):
            mask.refresh(samples(1))
        assert not mask.masks
        assert not mask.refreshes
    finally:
        del SCORES["mine"]


def test_dead_entries_score_nothing_and_weights_of_zero_are_no_error():
    model = network()
    with torch.no_grad():
        model[3].weight.zero_()
        model[0].bias.fill_(-100.0)  # dead: no gradient reaches the convolution
    for name in ("signal_to_noise", "gradient_to_weight", "ratio", "snip"):
        loader, options = data_of(name)
        found = parameter_scores(model, loader, name, **options)
        assert all(value.isfinite().all() for value in found.values()), name
        assert not found["0.weight"].any(), name
    mask = FisherMask(model, 0.5, score="snip")
    with pytest.warns(GradmaskWarning, match="score of 0"):
        mask.refresh(samples(1))


def test_a_score_that_works_in_place_changes_no_weight():
    name = "in_place_magnitude"
    register_score(name, formula="|w|", needs=["weight"])(lambda measured: measured.weight.abs_())
    try:
        model = network()
        before = [p.detach().clone() for p in model.parameters()]
        parameter_scores(model, None, name)
        assert all(map(torch.equal, before, model.parameters()))
    finally:
        del SCORES[name]
