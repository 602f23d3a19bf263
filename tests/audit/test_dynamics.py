"""`Dynamics` against a slow reference that keeps every visit."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from gradmask.audit import Dynamics
from gradmask.audit.accumulate import add_visits, new_state
from gradmask.audit.visits import Visits
from gradmask.errors import DataError, GradmaskWarning, OptionError, StateError


def history(samples, steps, classes=5, seed=0, repeated=False):
    """Batches of ids, logits and targets."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    for _ in range(steps):
        if repeated:
            ids = torch.randint(samples, (samples,), generator=generator)
        else:
            ids = torch.randperm(samples, generator=generator)[: samples // 2 + 1]
        yield ids, torch.randn(len(ids), classes, generator=generator) * 2, labels[ids]


def reference(batches, samples):
    """All scores, one sample and one visit at a time, in float64."""
    visits = {i: [] for i in range(samples)}
    for ids, logits, targets in batches:
        for i, z, y in zip(ids.tolist(), logits.double(), targets.tolist(), strict=True):
            others = [z[k] for k in range(len(z)) if k != y]
            visits[i].append(
                {
                    "margin": float(z[y] - max(others)),
                    "loss": float(-z.log_softmax(0)[y]),
                    "p": float(z.softmax(0)[y]),
                }
            )
    found = {}
    for i, seen in visits.items():
        if not seen:
            continue
        n = len(seen)
        margins = [v["margin"] for v in seen]
        right = [m > 0 for m in margins]
        p = torch.tensor([v["p"] for v in seen], dtype=torch.float64)
        found[i] = {
            "area_under_margin": sum(margins) / n,
            "cumulative_loss": sum(v["loss"] for v in seen) / n,
            "mean_probability": float(p.mean()),
            "wrong_share": right.count(False) / n,
            "forgetting_events": sum(a and not b for a, b in itertools.pairwise(right)),
            "learning_time": max([k + 1 for k, r in enumerate(right) if not r], default=0) + 1,
            "variability": float(p.std(correction=0)),
            "visits": n,
        }
        if n in (2, 4, 8, 16, 32, 64):  # halves of whole blocks
            half = n // 2
            found[i] |= {
                "early_margin": sum(margins[:half]) / half,
                "late_margin": sum(margins[half:]) / half,
            }
    return found


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize(("samples", "steps"), [(1, 1), (7, 30), (40, 64), (3, 300)])
def test_scores_are_those_of_all_visits(samples, steps, repeated):
    batches = list(history(samples, steps, repeated=repeated))
    dynamics = Dynamics(samples + 1)  # the last one is never visited
    for batch in batches:
        dynamics.update(*batch)
    scores = dynamics.scores()
    for i, expected in reference(batches, samples).items():
        for name, value in expected.items():
            tolerance = 1e-5 if name != "variability" else 1e-6
            assert scores[name][i].item() == pytest.approx(value, abs=tolerance), (i, name)
    assert scores["visits"][samples] == 0
    assert all(v[samples].isnan() for name, v in scores.items() if name != "visits")


@pytest.mark.parametrize("visits", range(2, 70))
def test_halves_are_those_of_all_visits_but_for_the_block_in_the_middle(visits):
    dynamics = Dynamics(1)
    margins = torch.arange(visits, dtype=torch.float64) ** 1.5
    for margin in margins:
        dynamics.update(
            torch.tensor([0]), torch.stack([margin, margin * 0])[None], torch.tensor([0])
        )
    scores = dynamics.scores()
    half = visits / 2
    whole = int(half)
    early = (margins[:whole].sum() + (half - whole) * margins[whole]) / half
    late = (margins.sum() - early * half) / half
    # A block of w visits holds one of 4 to 8 parts of all.
    width = max(1, 2 ** ((visits - 1) // 8).bit_length())
    slack = float(margins.diff().max()) * width**2 / (4 * half)
    assert scores["early_margin"].item() == pytest.approx(float(early), abs=slack + 1e-4)
    assert scores["late_margin"].item() == pytest.approx(float(late), abs=slack + 1e-4)


def test_state_goes_on_to_the_bit():
    batches = list(history(30, 40, repeated=True))
    whole, first = Dynamics(30), Dynamics(30)
    for batch in batches:
        whole.update(*batch)
    for batch in batches[:17]:
        first.update(*batch)
    state = copy.deepcopy(first.state_dict())
    for batch in batches[17:]:
        first.update(*batch)  # the state is a copy
    second = Dynamics(30)
    second.load_state_dict(state)
    for batch in batches[17:]:
        second.update(*batch)
    found = second.state_dict()
    for name, value in whole.state_dict().items():
        same = torch.equal(value, found[name]) if torch.is_tensor(value) else value == found[name]
        assert same, name


def test_state_of_others_is_refused_and_nothing_is_changed():
    dynamics = Dynamics(30)
    for batch in history(30, 3):
        dynamics.update(*batch)
    before = dynamics.scores()
    for other in (Dynamics(31), Dynamics(15, positions=2), Dynamics(30, multilabel=True)):
        with pytest.raises(StateError, match="30"):
            dynamics.load_state_dict(other.state_dict())
    with pytest.raises(StateError, match="later version"):
        dynamics.load_state_dict({"version": 2})
    state = dynamics.state_dict()
    for name in ("left_out", "sums"):
        for damage in (None, torch.zeros(7), state[name].numpy()):
            with pytest.raises(StateError, match="damaged"):
                dynamics.load_state_dict({**state, name: damage})
    with pytest.raises(StateError, match="not a state"):
        dynamics.load_state_dict([1])
    for name, value in dynamics.scores().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num())


def test_suggestion_is_the_class_of_most_visits():
    dynamics = Dynamics(2)
    logits = torch.tensor([[3.0, 2, 0, 0], [3, 0, 1, 2]])
    for step in range(9):
        z = logits.clone()
        if step % 3 == 0:
            z[0] = torch.tensor([3.0, 0, 0, 2])
        dynamics.update(torch.arange(2), z, torch.zeros(2, dtype=torch.long))
    classes, probabilities = dynamics.suggestions()
    assert classes.tolist() == [1, 3]
    expected = torch.tensor([0.0, 1, 2]).softmax(0)[2].item()
    assert probabilities[1].item() == pytest.approx(expected, abs=1e-6)


def test_unlabelled_and_unusable_visits_count_for_nothing():
    dynamics = Dynamics(4)
    logits = torch.randn(4, 3)
    logits[2, 1] = torch.inf
    dynamics.update(torch.arange(4), logits, torch.tensor([0, -100, 1, 2]))
    with pytest.warns(GradmaskWarning, match="1 visits"):
        scores = dynamics.scores()
    assert scores["visits"].tolist() == [1, 0, 0, 1]


def test_sequences_count_by_their_mean_or_each_position_by_itself():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 4, 6), torch.randint(6, (3, 4))
    targets[1, 2:] = -100
    targets[2] = -100
    losses = F.cross_entropy(logits.movedim(-1, 1), targets, reduction="none")
    for layout in (logits, logits.movedim(-1, 1)):
        mean, each = Dynamics(5), Dynamics(5, positions=6)
        for dynamics in (mean, each):
            dynamics.update(torch.tensor([3, 0, 1]), layout, targets)
        found = mean.scores()["cumulative_loss"]
        expected = [losses[1, :2].mean(), torch.nan, torch.nan, losses[0].mean(), torch.nan]
        assert torch.allclose(found, torch.tensor(expected).double(), atol=1e-6, equal_nan=True)
        found = each.scores()["cumulative_loss"]
        assert found.shape == (5, 6)
        assert torch.allclose(found[3, :4], losses[0].double(), atol=1e-6)
        assert found[0].isfinite().tolist() == [True, True, False, False, False, False]
        assert mean.suggestions()[0].tolist() == [-1] * 5
        assert (each.suggestions()[0][3, :4] != targets[0]).all()


def test_labels_of_their_own():
    torch.manual_seed(0)
    logits = torch.randn(4, 3)
    targets = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, -100, torch.nan], [1, 1, 1]])
    dynamics = Dynamics(4, positions=3, multilabel=True)
    dynamics.update(torch.arange(4), logits, targets)
    margin = dynamics.scores()["area_under_margin"]
    signs = torch.where(targets == 1, 1.0, -1.0)
    known = torch.ones_like(logits, dtype=torch.bool)
    known[2, 1:] = False
    assert torch.allclose(margin[known], (signs * logits)[known].double())
    assert margin[~known].isnan().all()
    assert torch.equal(dynamics.suggestions()[0][known], 1 - targets[known].long())
    whole = Dynamics(4, multilabel=True)
    whole.update(torch.arange(4), logits, targets)
    losses = F.binary_cross_entropy_with_logits(
        logits, targets.clamp(0, 1).nan_to_num(), reduction="none"
    )
    expected = torch.where(known, losses, 0).sum(1) / known.sum(1)
    assert torch.allclose(whole.scores()["cumulative_loss"], expected.double(), atol=1e-6)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_logit_a_sample_is_binary(shape):
    logits = torch.tensor([2.0, -1, 3, -4]).reshape(shape)
    dynamics = Dynamics(4)
    dynamics.update(torch.arange(4), logits, torch.tensor([1, 1, 0, 0]))
    assert dynamics.scores()["area_under_margin"].tolist() == [2, -1, -3, 4]


def test_large_vocabularies_are_measured_in_parts(monkeypatch):
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    whole, parts = Dynamics(3, positions=5), Dynamics(3, positions=5)
    whole.update(torch.arange(3), logits, targets)
    monkeypatch.setattr("gradmask.audit.visits._CHUNK", 20)
    parts.update(torch.arange(3), logits, targets)
    for name, value in whole.scores().items():
        assert torch.equal(value.nan_to_num(), parts.scores()[name].nan_to_num()), name


def test_half_precision_is_measured_in_single():
    logits = torch.tensor([[8.0, 0, 0]], dtype=torch.bfloat16)
    dynamics = Dynamics(1)
    dynamics.update(torch.tensor([0]), logits, torch.tensor([0]))
    expected = F.cross_entropy(logits.double(), torch.tensor([0])).item()
    assert dynamics.scores()["cumulative_loss"].item() == pytest.approx(expected, rel=1e-5)


IDS, LOGITS, TARGETS = torch.arange(3), torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((IDS + 8, LOGITS, TARGETS), "whole training set"),
        ((IDS - 1, LOGITS, TARGETS), "from -1"),
        ((IDS.float(), LOGITS, TARGETS), "Indexed"),
        ((IDS.bool(), LOGITS, TARGETS), "Indexed"),
        ((IDS[:1], LOGITS[:1], TARGETS[0]), "dimension of samples"),
        ((IDS, LOGITS, LOGITS.bool()), "multilabel=True"),
        ((IDS[:2], LOGITS, TARGETS), "2 ids"),
        ((IDS, LOGITS, TARGETS + 4), "4 classes"),
        ((IDS, LOGITS, F.one_hot(TARGETS, 4).float()), "argmax"),
        ((IDS, LOGITS[:, :, None], TARGETS), "do not fit"),
        ((IDS, torch.zeros(3, 5, 5), torch.zeros(3, 5).long()), "class_dim"),
        ((IDS.tolist(), LOGITS, TARGETS), "tensor"),
        ((IDS, LOGITS[:, 0], TARGETS + 2), "0 or 1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(batch, words):
    dynamics = Dynamics(10)
    with pytest.raises(DataError, match=words):
        dynamics.update(*batch)
    assert dynamics.scores()["visits"].sum() == 0


@pytest.mark.parametrize(
    "options", [{"samples": 0}, {"samples": 2.5}, {"samples": 3, "positions": 0}]
)
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(OptionError, match="at least 1"):
        Dynamics(**options)


def test_gradients_and_random_state_are_left_alone():
    logits = torch.randn(3, 4, requires_grad=True)
    before = torch.get_rng_state()
    dynamics = Dynamics(3)
    dynamics.update(IDS, logits, TARGETS)
    assert torch.equal(torch.get_rng_state(), before)
    logits.sum().backward()
    assert not any(v.requires_grad for v in dynamics.scores().values())


def test_a_sample_costs_no_more_than_83_bytes():
    state = new_state(1000, torch.device("cpu"))
    assert sum(v.numel() * v.element_size() for v in state.values()) / 1001 <= 83


def test_counts_of_what_belongs_to_no_sample_may_overflow():
    state = new_state(2, torch.device("cpu"))
    state["counts"][2, 0] = 2**31 - 2
    rows = torch.full((9,), -1)
    add_visits(state, [Visits(rows, rows, torch.ones(9, 5))])
    assert state["counts"][:2, 0].tolist() == [0, 0]
    assert state["margins"][:2].sum() == 0


@pytest.mark.parametrize("repeated", [False, True])
def test_where_updates_are_read_changes_no_bit(repeated):
    """Several updates are added at once, unless a sample is in more than one of them."""
    often, never = Dynamics(60), Dynamics(60)
    for batch in history(60, 37, repeated=repeated):
        for ids, logits, targets in zip(*(part.split(7) for part in batch), strict=True):
            often.update(ids, logits, targets)
            often.suggestions()
            never.update(ids, logits, targets)
    for name, value in often.state_dict().items():
        other = never.state_dict()[name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_an_interrupted_sum_counts_nothing_twice(monkeypatch):
    from gradmask.audit import dynamics as module

    def interrupted(state, batches):
        add_visits(state, batches)
        raise KeyboardInterrupt

    dynamics = Dynamics(60)
    for ids, logits, targets in history(60, 3):
        dynamics.update(ids, logits, targets)
    monkeypatch.setattr(module, "add_visits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dynamics.scores()
    monkeypatch.undo()
    assert dynamics.scores()["visits"].sum() == 3 * 31


def test_what_belongs_to_no_sample_is_in_no_state():
    often, never = Dynamics(60), Dynamics(60)
    for ids, logits, targets in history(60, 5):
        for i, part in enumerate(ids.split(7)):
            labels = targets.split(7)[i].clone()
            labels[0] = -100
            for dynamics in (often, never):
                dynamics.update(part, logits.split(7)[i], labels)
            often.scores()
    for name, value in often.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, never.state_dict()[name]), name


def test_copies_share_nothing():
    dynamics = Dynamics(60)
    (batch,) = history(60, 1)
    dynamics.update(*batch)
    other = copy.copy(dynamics)
    other.update(*batch)
    assert other.scores()["visits"].max() == 2
    assert dynamics.scores()["visits"].max() == 1


def test_updates_from_before_the_ranks_met_count_once(monkeypatch):
    dynamics = Dynamics(60)
    (batch,) = history(60, 1)
    dynamics.update(*batch)
    monkeypatch.setattr(Dynamics, "_ranks", lambda self: 2)
    assert dynamics.scores()["visits"].sum() == 31
    dynamics.update(*batch)
    with pytest.raises(StateError, match="gather"):
        dynamics.scores()
