"""`rank`, `plant` and their files on labels, names and images of other kinds."""

import base64
import csv
import io
import sys

import pytest
import torch

from gradmask.audit import Dynamics, plant, rank
from gradmask.audit.planted import Threshold
from gradmask.audit.report import _encoded
from gradmask.errors import DataError, GradmaskWarning, OptionError, StateError


def of_three(visits=2):
    dynamics = Dynamics(3)
    for _ in range(visits):
        dynamics.update(torch.arange(3), torch.eye(3), torch.arange(3))
    return dynamics


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rank(of_three(), extra={"label": torch.zeros(3)}), "'label'"),
        (lambda: rank(of_three(), class_names={"cat": 0}), "number"),
        (lambda: rank(object()), "not Dynamics"),
        (lambda: rank(of_three()).report("page.html", [torch.rand(3)] * 3), "leave out images"),
        (lambda: rank(of_three()).report("page.html", [{"text": "x"}] * 3), "'x'"),
        (lambda: rank(of_three()).report("page.html", [torch.rand(3, 4, 4)]), "1 entries"),
        (lambda: rank(of_three()).report("page.html", top=0), "at least 1"),
    ],
)
def test_options_of_other_kinds_are_refused(call, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=words):
        call()
    assert not list(tmp_path.iterdir())


def test_a_rank_needs_a_visit():
    with pytest.raises(StateError, match="No sample was visited"):
        rank(of_three(0), share=0.5)
    assert rank(of_three(1), share=0.5).flagged.any()


@pytest.mark.parametrize("kind", [list, torch.Tensor.numpy, torch.Tensor.int, torch.Tensor.double])
def test_labels_of_other_kinds_are_the_same(kind):
    labels = torch.arange(200) % 5
    given = labels.tolist() if kind is list else kind(labels)
    first, second = plant(labels, 5, share=0.2), plant(given, 5, share=0.2)
    assert second.labels.dtype == torch.int64
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(rank(of_three(), given[:3]).labels, labels[:3])
    with pytest.raises(DataError, match="whole numbers"):
        rank(of_three(), ["a", "b", "c"])
    with pytest.raises(DataError, match="whole numbers"):
        rank(of_three(), [0.5, 1.0, 1.0])


def test_labels_of_bytes_do_not_wrap():
    planted = plant((torch.arange(200) % 5).byte(), 300, share=0.2)
    assert planted.labels.max() > 255
    planted = plant((torch.arange(200) % 5).byte(), 256, share=0.2, kind="class")
    assert planted.labels.max() == 256


def test_planted_samples_get_their_label_back():
    given = torch.arange(200) % 5
    planted, dynamics = plant(given, 5, share=0.2), Dynamics(200)
    for _ in range(2):
        dynamics.update(torch.arange(200), torch.randn(200, 5), planted.labels)
    ranking = rank(dynamics, planted.labels, planted=planted, share=0.1)
    assert torch.equal(ranking.relabelled()[planted.ids], given[planted.ids])


def test_names_of_other_kinds(tmp_path):
    pandas = pytest.importorskip("pandas")
    keys = pandas.Series(["a", "b\udcff", "c"], index=[2, 0, 1], dtype=object)
    names = {0: "zero", "1": "one"}
    ranking = rank(of_three(), range(3), keys=keys, class_names=names)
    rows = list(csv.DictReader(ranking.save(tmp_path / "new" / "t.csv").open(encoding="utf-8")))
    assert {(row["sample"], row["key"]) for row in rows} == {
        ("0", "a"),
        ("1", "b\\udcff"),
        ("2", "c"),
    }
    assert {row["label"] for row in rows} == {"zero", "one", "2"}
    ranking.save(tmp_path / "t.parquet")
    assert "udcff" in ranking.report(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "\n" not in repr(ranking)
    assert len(repr(ranking)) < 200


def test_images_with_four_channels_last_and_in_files_are_drawn_as_they_are(tmp_path):
    image = pytest.importorskip("PIL.Image")
    array = torch.zeros(8, 8, 4, dtype=torch.uint8)
    array[:, :, 0] = 255
    image.fromarray(array[:, :, :3].numpy()).save(tmp_path / "red.png")
    for sample in (array.numpy(), tmp_path / "red.png", (str(tmp_path / "red.png"), 0)):
        drawn = image.open(io.BytesIO(base64.b64decode(_encoded(sample))))
        assert drawn.getpixel((3, 3)) == (255, 0, 0)


def of_many(samples=400, sure=3.0):
    """Dynamics of samples of five classes whose given label is the network's, at a logit."""
    labels = torch.arange(samples) % 5
    planted = plant(labels, 5, share=0.1, seed=1)
    dynamics, generator = Dynamics(samples), torch.Generator().manual_seed(0)
    for _ in range(6):
        noise = torch.randn(samples, 5, generator=generator) * 0.3
        logits = sure * torch.nn.functional.one_hot(labels, 5) + noise
        dynamics.update(torch.arange(samples), logits, planted.labels)
    return dynamics, planted


def test_a_share_promises_nothing():
    dynamics, planted = of_many()
    table = rank(dynamics, planted.labels, planted=planted, share=0.3)
    assert table.threshold is None
    assert int(table.flagged.sum()) == round(0.3 * 360)
    assert not (table.flagged & table.planted).any()


def test_labels_that_are_not_learnt_are_told(monkeypatch):
    promise = Threshold(0.9, 0.05, 0.2, 0.5)
    monkeypatch.setattr(sys.modules["gradmask.audit.rank"], "threshold", lambda *_: promise)
    dynamics, planted = of_many(sure=0.5)
    with pytest.warns(GradmaskWarning, match="not learnt yet"):
        rank(dynamics, planted.labels, planted=planted)
    dynamics, planted = of_many(sure=4.0)
    rank(dynamics, planted.labels, planted=planted)


def test_a_data_set_of_another_length_is_refused():
    with pytest.raises(DataError, match="2 samples, and 3"):
        rank(of_three(), share=0.4).clean([0, 1])


def test_extra_scores_have_the_tables_shape():
    with pytest.raises(DataError, match="mine"):
        rank(of_three(), extra={"mine": torch.zeros(3, 2)})
    dynamics = Dynamics(3, positions=2)
    dynamics.update(torch.arange(3), torch.randn(3, 2, 4), torch.zeros(3, 2).long())
    table = rank(dynamics, extra={"mine": torch.arange(6.0).reshape(3, 2).numpy()})
    assert table.scores["mine"].tolist() == [0, 1, 2, 3, 4, 5]


def test_issues_of_positions_say_whose_they_are():
    pytest.importorskip("pandas")
    labels = torch.tensor([[0, 1], [2, -100], [3, 0]])
    dynamics = Dynamics(3, positions=2)
    dynamics.update(torch.arange(3), torch.randn(3, 2, 4), labels)
    table = rank(dynamics, labels, share=0.4).issues()
    assert table["sample"].tolist() == [0, 0, 1, 2, 2]
    assert table["position"].tolist() == [0, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("image", "brightest"),
    [
        (torch.eye(4).bool(), 255),
        (torch.eye(4).int(), 255),
        (torch.tensor([[0, 256], [512, 65535]], dtype=torch.int32), 255),
        (torch.tensor([[0, 7], [100, 200]], dtype=torch.uint8), 200),
    ],
)
def test_pixels_of_other_types_are_drawn(image, brightest):
    from PIL import Image

    drawn = Image.open(io.BytesIO(base64.b64decode(_encoded(image))))
    values = torch.tensor(list(drawn.convert("L").getdata()))
    assert values.max() == brightest
    assert values.min() == 0


def test_names_of_files_may_be_written_in_capitals(tmp_path):
    assert rank(of_three(), share=0.4).save(tmp_path / "table.CSV").is_file()


def test_false_alarms_are_checked_without_planted_samples():
    with pytest.raises(OptionError, match="false_alarms"):
        rank(of_three(), false_alarms=float("nan"))
