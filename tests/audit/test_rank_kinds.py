"""`rank`, `plant` and their files on labels, names and images of other kinds."""

import base64
import csv
import io

import pytest
import torch

from gradmask.audit import Dynamics, plant, rank
from gradmask.audit.report import _encoded
from gradmask.errors import DataError, OptionError, StateError


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
    ranking = rank(dynamics, planted.labels, planted=planted)
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
