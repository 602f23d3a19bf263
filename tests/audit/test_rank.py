"""The table, the threshold that planted labels calibrate, and what other tools read of them."""

import csv
import re

import pytest
import torch
from torch.utils.data import TensorDataset

from gradmask.audit import SCORES, Dynamics, plant, rank
from gradmask.audit.planted import threshold
from gradmask.audit.scores import COMBINED, suspicion_share
from gradmask.errors import DataError, OptionError


def trained(given, true, classes, visits=12, seed=0, unvisited=()):
    """Dynamics of a made-up training, which mostly takes samples for their true class."""
    generator = torch.Generator().manual_seed(seed)
    dynamics = Dynamics(len(given))
    seen = torch.tensor([i for i in range(len(given)) if i not in unvisited])
    for _ in range(visits):
        for ids in seen[torch.randperm(len(seen), generator=generator)].split(50):
            logits = torch.randn(len(ids), classes, generator=generator)
            logits += 2.5 * torch.nn.functional.one_hot(true[ids], classes)
            dynamics.update(ids, logits, given[ids])
    return dynamics


def noisy(samples=400, classes=5, share=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    true = torch.randint(classes, (samples,), generator=generator)
    wrong = torch.rand(samples, generator=generator) < share
    given = torch.where(wrong, (true + 1) % classes, true)
    return given, true, wrong


def test_wrong_labels_come_first_with_their_true_class():
    given, true, wrong = noisy()
    ranking = rank(trained(given, true, 5), given, share=0.2)
    first = ranking.order[: int(wrong.sum())]
    assert wrong[first].double().mean() > 0.9
    assert (ranking.suggestions[first] == true[first])[wrong[first]].double().mean() > 0.9
    assert int(ranking.flagged.sum()) == 80
    assert ranking.flagged[ranking.order[:80]].all()
    cleaned = ranking.clean(TensorDataset(given))
    assert len(cleaned) == 320
    assert not set(cleaned.indices) & set(ranking.order[:80].tolist())
    relabelled = ranking.relabelled(0.0)
    assert (relabelled == true).double().mean() > 0.95
    assert torch.equal(ranking.relabelled(1.0), given)
    assert (ranking.predictions[first] == true[first]).double().mean() > 0.9


def test_combined_rank_is_the_mean_of_the_ranks():
    given, true, _ = noisy(60)
    dynamics = trained(given, true, 5)
    scores, ranking = dynamics.scores(), rank(dynamics, given)
    for i in (0, 17, 59):
        expected = 0.0
        for name, weight in COMBINED.items():
            sign = 1 if SCORES[name].high else -1
            values = sign * scores[name]
            below = (values < values[i]).sum() + 0.5 * (values == values[i]).sum()
            expected += weight / sum(COMBINED.values()) * float(below) / 60
        assert float(ranking.suspicion[i]) == pytest.approx(expected)


def test_shares_leave_out_what_is_not_known():
    values = torch.tensor([3.0, torch.nan, 1.0, 3.0])
    assert suspicion_share(values, high=True)[[0, 2, 3]].tolist() == pytest.approx(
        [2 / 3, 1 / 6, 2 / 3]
    )
    assert suspicion_share(values, high=False)[2] == pytest.approx(5 / 6)
    assert suspicion_share(values, high=True)[1].isnan()


def test_unvisited_samples_come_last_and_are_never_flagged():
    given, true, _ = noisy(100)
    ranking = rank(trained(given, true, 5, unvisited=(3, 50)), given, share=0.5)
    assert set(ranking.order[-2:].tolist()) == {3, 50}
    assert not ranking.flagged[[3, 50]].any()
    assert ranking.predictions[3] == -1


def test_nothing_is_flagged_without_a_place_to_cut():
    given, true, _ = noisy(100)
    ranking = rank(trained(given, true, 5), given)
    assert not ranking.flagged.any()
    assert ranking.threshold is None


def test_promised_false_alarms_are_kept_on_average():
    found = {0.05: [], 0.1: [], 0.2: []}
    recalls = {rate: [] for rate in found}
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        _, true, wrong = noisy(2000, share=0.15, seed=seed)
        offset = torch.randint(1, 5, true.shape, generator=generator)
        planted = plant(torch.where(wrong, (true + offset) % 5, true), 5, seed=seed)
        dynamics = Dynamics(2000)
        for _ in range(4):
            logits = torch.randn(2000, 5, generator=generator)
            logits += 2.5 * torch.nn.functional.one_hot(true, 5)
            dynamics.update(torch.arange(2000), logits, planted.labels)
        for rate in found:
            ranking = rank(dynamics, planted.labels, planted=planted, false_alarms=rate)
            flagged = ranking.flagged
            assert not flagged[planted.ids].any()
            found[rate].append(float((~wrong[flagged]).double().mean()) if flagged.any() else 0.0)
            recalls[rate].append(float(flagged[wrong].double().mean()))
    for rate, alarms in found.items():
        assert sum(alarms) / len(alarms) <= 1.3 * rate
        assert sum(recalls[rate]) / len(recalls[rate]) > 0.3


def test_threshold_of_separated_samples_is_exact():
    right, wrong = torch.linspace(0, 0.5, 900), torch.linspace(0.6, 1, 100)
    planted = torch.linspace(0.6, 1, 200)
    cut = threshold(torch.cat([right, wrong]), planted, 0.05)
    assert cut.wrong_share == pytest.approx(0.1, abs=0.01)
    assert cut.false_alarms <= 0.05
    assert cut.found_share > 0.95
    assert 0.5 < cut.value <= 0.62


def test_threshold_flags_nothing_where_it_cannot_promise():
    torch.manual_seed(0)
    same = torch.rand(2000)  # wrong labels look like right ones, of which there are many more
    cut = threshold(torch.cat([same, torch.rand(20) + 1]), torch.rand(200), 0.01)
    assert cut.false_alarms <= 0.01
    assert threshold(torch.zeros(500), torch.ones(100), 0.1).value == torch.inf


@pytest.mark.parametrize("kind", ["label", "class"])
def test_planted_labels_are_wrong(kind):
    labels = torch.arange(1000) % 4
    planted = plant(labels, 4, kind=kind, seed=3)
    changed = (planted.labels != labels).nonzero().flatten()
    assert torch.equal(changed, planted.ids)
    assert len(changed) == 50
    if kind == "class":
        assert (planted.labels[changed] == 4).all()
    else:
        offsets = (planted.labels - labels)[changed] % 4
        assert set(offsets.tolist()) == {1, 2, 3}
    assert not torch.equal(planted.ids, plant(labels, 4, kind=kind, seed=4).ids)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plant(torch.zeros(100).long(), 1), "at least 2"),
        (lambda: plant(torch.zeros(100).long(), 2, share=0.7), "one half"),
        (lambda: plant(torch.zeros(100).long(), 2), "20 samples"),
        (lambda: plant(torch.zeros(1000).long(), 2, kind="x"), "kind"),
        (lambda: threshold(torch.rand(9), torch.rand(9), 0.1), "at least 20"),
        (lambda: threshold(torch.rand(9), torch.rand(99), 1.0), "between 0 and 1"),
        (lambda: rank(Dynamics(3), share=1.5), "below 1"),
    ],
)
def test_options_out_of_range_are_refused(call, words):
    with pytest.raises(OptionError, match=words):
        call()


def test_what_is_not_one_for_each_sample_is_refused():
    dynamics = Dynamics(3)
    for options in ({"labels": [0]}, {"keys": ["a"]}, {"extra": {"x": torch.zeros(2)}}):
        with pytest.raises(DataError, match="3"):
            rank(dynamics, **options)
    with pytest.raises(DataError, match="from 0 to 1"):
        plant(torch.full((1000,), 5), 2)


def test_labels_of_positions_have_rows_of_their_own():
    dynamics = Dynamics(2, positions=3)
    targets = torch.tensor([[0, 1, -100], [1, 1, 1]])
    for _ in range(2):
        dynamics.update(torch.arange(2), torch.randn(2, 3, 4), targets)
    ranking = rank(dynamics, targets, keys=["a", "b"])
    assert ranking.ids.tolist() == [0, 0, 1, 1, 1]
    assert ranking.positions.tolist() == [0, 1, 0, 1, 2]
    assert ranking.labels.tolist() == [0, 1, 1, 1, 1]
    with pytest.raises(OptionError, match="whole samples"):
        ranking.clean([1, 2])
    with pytest.raises(OptionError, match="whole samples"):
        rank(dynamics, targets, planted=plant(torch.zeros(100), 2, share=0.2))


NAMES = ["cat", "犬", "<i>x</i>", "кот", "a,b"]


def written():
    given, true, _ = noisy(200)
    planted = plant(given, 5, share=0.2)
    keys = [f'{i} "é",<b>.png' for i in range(200)]
    dynamics = trained(planted.labels, true, 5)
    extra = {"gradient_norm": torch.rand(200)}
    return rank(
        dynamics, planted.labels, planted=planted, keys=keys, class_names=NAMES, extra=extra
    )


def test_csv_and_parquet_hold_the_table(tmp_path):
    import pyarrow.parquet

    ranking = written()
    with ranking.save(tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    table = pyarrow.parquet.read_table(ranking.save(tmp_path / "t.parquet")).to_pylist()
    assert len(rows) == len(table) == 200
    for row, other, i in zip(rows, table, ranking.order.tolist(), strict=True):
        assert int(row["sample"]) == other["sample"] == i
        assert row["key"] == other["key"] == ranking.keys[i]
        assert row["label"] == other["label"] == NAMES[ranking.labels[i]]
        assert float(row["suspicion"]) == pytest.approx(float(ranking.suspicion[i]), rel=1e-5)
        assert (row["flagged"] == "1") == other["flagged"] == bool(ranking.flagged[i])
    with pytest.raises(OptionError, match=r"\.parquet"):
        ranking.save(tmp_path / "t.xlsx")


def test_issues_are_as_cleanlab_has_them():
    pytest.importorskip("pandas")
    ranking = written()
    found = ranking.issues()
    assert list(found) == ["is_label_issue", "label_score", "given_label", "predicted_label"]
    assert found["is_label_issue"].tolist() == ranking.flagged.tolist()
    assert found["label_score"].between(0, 1).all()
    assert found["given_label"][0] == NAMES[ranking.labels[0]]


def test_page_shows_the_most_suspicious_and_escapes_names(tmp_path):
    ranking = written()
    images = torch.randint(256, (200, 3, 8, 8), dtype=torch.uint8)
    page = ranking.report(tmp_path / "r.html", images, top=30).read_text(encoding="utf-8")
    assert page.count("<tr") == 31
    assert page.count("data:image/png") == 30
    assert "<i>x</i>" not in page
    assert "<b>.png" not in page
    samples = re.findall(r'data-order="(\d+)">\d+</td>', page)
    assert [int(s) for s in samples] == ranking.order[:30].tolist()
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    "image",
    [
        torch.rand(1, 8, 8),
        torch.rand(8, 8),
        torch.randn(3, 20, 10),
        (torch.rand(3, 8, 8), 5),
        {"pixel_values": torch.rand(3, 8, 8), "labels": 1},
        torch.randint(256, (8, 8, 3), dtype=torch.uint8).numpy(),
        {"label": torch.tensor(1), "image": torch.rand(8, 8).numpy()},
        torch.rand(2, 8, 8),
    ],
)
def test_images_of_many_kinds_are_drawn(tmp_path, image):
    given, true, _ = noisy(40)
    ranking = rank(trained(given, true, 5), given)
    page = ranking.report(tmp_path / "r.html", [image] * 40, top=3).read_text()
    assert page.count("data:image/png") == 3
