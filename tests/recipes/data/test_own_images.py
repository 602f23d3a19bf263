"""Images of people's own: what is taken for what, what is decoded, and what is said of it."""

import shutil
from io import StringIO

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from gradmask.errors import DataError, GradmaskWarning, OptionError
from gradmask.recipes.config import Comparison
from gradmask.recipes.data import cache as cache_module
from gradmask.recipes.data import sources
from gradmask.recipes.data.batches import Batches
from gradmask.recipes.data.cache import followed, show_cache
from gradmask.recipes.data.folders import warn_once
from gradmask.recipes.data.images import load_images
from gradmask.recipes.data.stored import StoredImages, View
from gradmask.recipes.data.transforms import augment_batch, transform_of

CLASSES = ("ant", "bee", "cow")
COUNTS = {"train": 30, "val": 9, "test": 12}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    sources._stored_source.cache_clear()
    warn_once.cache_clear()


@pytest.fixture
def folder(tmp_path):
    """Ten images of each class to train on, three to validate on, four to test on."""
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for i in range(count):
            path = tmp_path / "photos" / split / CLASSES[i % 3] / f"{split}_{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(1, 256, (12, 16, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def config_of(folder, **options):
    return Comparison(data=str(folder), **({"image_size": 8} | options))


def counts(data):
    return [len(part) for part in (data.train_labels, data.val_labels, data.test_labels)]


@pytest.mark.parametrize("streaming", [False, True])
def test_validation_images_of_ones_own_are_used(folder, streaming):
    options = {"streaming": streaming, "workers": 0} if streaming else {}
    data = load_images(config_of(folder, **options), 0)
    assert counts(data) == [30, 9, 12]
    assert "9 of the data's own to validate on" in data.found
    sources._stored_source.cache_clear()
    held = load_images(config_of(folder, validation=0.2, **options), 0)  # as older folders have it
    assert counts(held) == [24, 6, 12]
    assert "6 held out of these to validate on" in held.found
    shutil.rmtree(folder / "test")
    sources._stored_source.cache_clear()
    data = load_images(config_of(folder, **options), 0)  # no others are for tests
    assert counts(data) == [27, 3, 9]
    assert "9 to test on, the data's validation images" in data.found


def test_only_images_that_are_used_are_decoded(folder, monkeypatch):
    opened = []
    original = StoredImages.open
    monkeypatch.setattr(
        StoredImages, "open", lambda self, i: (opened.append(self.name(i)), original(self, i))[1]
    )
    config = config_of(folder, classes=2, train_size=8, test_size=4, validation=0.5)
    data = load_images(config, 0)
    assert counts(data) == [4, 4, 4]
    assert data.test_labels.tolist().count(0) == 2
    assert len(opened) == len(set(opened)) == 12
    assert data.found == (
        "2 classes: 4 images to train on (2 a class), 4 held out of these to validate on, 4 of 8 "
        "to test on. Each is 8 x 8 pixels, in colour, cut from 12 x 16."
    )
    assert torch.equal(load_images(config, 5).test_images, data.test_images)
    assert len(opened) == 12
    with pytest.raises(DataError, match="test_size=13 is more than the 12 test images"):
        load_images(config_of(folder, test_size=13), 0)


def test_how_far_decoding_is(monkeypatch, capsys):
    assert list(followed("abc", 3, "Decoding")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""  # soon done
    monkeypatch.setattr(cache_module, "EVERY", 0.0)
    assert list(followed("abc", 3, "Decoding")) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Decoding: 1 of 3, about 0 s left")
    assert len(lines) == 3


def test_the_cache_is_listed_and_cleared(folder):
    def shown(**options):
        console = Console(file=StringIO(), width=200)
        show_cache(console, **options)
        return console.file.getvalue().splitlines()

    assert shown()[0].startswith("0 bytes in ")
    load_images(config_of(folder), 0)
    lines = shown()
    assert len(lines) == 4
    assert any("images/photos-train-" in line and "KiB" in line for line in lines)
    assert "--clear" in lines[-1]
    assert "removed from" in shown(clear=True)[0]
    assert shown()[0].startswith("0 bytes in ")
    load_images(config_of(folder), 0)


def write_table(folder, lines, head="file,label,split", name="labels.csv"):
    path = folder.parent / name
    path.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8-sig")
    return str(path)


def in_any_order(folder):
    """All images in one folder, and a line for each."""
    lines = []
    (folder / "all").mkdir()
    for path in sorted(folder.glob("*/*/*.png")):
        split, label = path.parts[-3:-1]
        shutil.move(path, folder / "all" / path.name)
        lines.append(f"all/{path.name},{label},{split}")
    return lines


def test_labels_from_a_table(folder):
    by_folder = load_images(config_of(folder), 0)
    lines = in_any_order(folder)
    table = write_table(folder, lines)
    data = load_images(config_of(folder, labels_csv=table), 0)
    assert data.class_names == CLASSES
    assert torch.equal(data.train_images, by_folder.train_images)
    assert torch.equal(data.test_labels, by_folder.test_labels)
    fewer = [line.rpartition(",")[0].replace(",", ";") for line in lines if "train" in line]
    table = write_table(folder, fewer, "File_Name;LABEL")
    with pytest.warns(GradmaskWarning, match=r"21 images that labels\.csv does not name \(first: "):
        data = load_images(config_of(folder, labels_csv=table, validation=0.5), 0)
    assert counts(data) == [12, 12, 6]
    table = write_table(
        folder, [f"all/train_{i:02}.png,{8 + i % 3}" for i in range(30)], "file,label"
    )
    warn_once.cache_clear()
    with pytest.warns(GradmaskWarning):
        data = load_images(config_of(folder, labels_csv=table, validation=0.5), 0)
    assert data.class_names == ("8", "9", "10")


@pytest.mark.parametrize(
    ("lines", "head", "message"),
    [
        (
            ["a.png,ant,train"],
            "file,label,split",
            r"lacks 1 of the 1 files in .*: a\.png\. Files mu",
        ),
        (["all/train_00.png,ant,train"] * 2, "file,label,split", "line 3: .* is there twice"),
        (["all/train_00.png,ant,train"], "file,label,split", "1 classes to train on"),
        (["all/train_00.png,ant"], "picture,class", "must have the columns file and label .* pict"),
        (["all/train_00.png,,train"], "file,label,split", "line 2 has no label"),
        (["all/train_00.png,ant,dev"], "file,label,split", "line 2 has no known split"),
        ([], "", "columns file and label in its first line, and has none"),
    ],
)
def test_tables_that_cannot_be_used(folder, lines, head, message):
    in_any_order(folder)
    with pytest.raises(DataError, match=message):
        load_images(config_of(folder, labels_csv=write_table(folder, lines, head)), 0)


def test_a_table_that_is_not_there_or_has_no_folder(folder):
    with pytest.raises(DataError, match=r"labels_csv='no\.csv' cannot be read"):
        load_images(config_of(folder, labels_csv="no.csv"), 0)
    with pytest.raises(DataError, match="No folder at"):
        load_images(config_of("owner/name", labels_csv="no.csv"), 0)


def test_flips_and_crops_can_be_left_out():
    images = torch.randint(1, 256, (40, 3, 8, 8), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    mirrored = augment_batch(Comparison(data="x/y", crop=False), images, generator)
    same = (mirrored == images).flatten(1).all(1)
    assert 5 < same.sum() < 35
    assert torch.equal(mirrored[~same], images[~same].flip(3))
    moved = augment_batch(Comparison(data="x/y", flip=False), images, generator)
    kept = augment_batch(Comparison(data="x/y", flip=False), images.flip(3), generator)
    assert not torch.equal(moved, images)
    assert not torch.equal(moved.flip(3), kept)
    plain = Comparison(data="x/y", crop=False, flip=False)
    assert augment_batch(plain, images, generator) is images
    assert augment_batch(Comparison(crop=False), images, generator) is images  # digits


def test_flips_and_crops_of_streamed_images(folder):
    stored = load_images(config_of(folder, streaming=True, workers=0), 0).train_images
    middle = stored.centre(0)
    plain = View(crop=False, flip=False)
    assert all(torch.equal(plain(stored, (0, seed)), middle) for seed in range(5))
    found = {View(crop=False)(stored, (0, seed)).numpy().tobytes() for seed in range(20)}
    assert found == {image.numpy().tobytes() for image in (middle, middle.flip(2))}
    assert len({View(flip=False)(stored, (0, s)).numpy().tobytes() for s in range(5)}) == 5


OWN = """
import random
import numpy
import torch
from torchvision.transforms import v2

drawn = []
good = v2.Compose([v2.RandomHorizontalFlip(), v2.Resize(8), v2.CenterCrop(8)])
all_kinds = lambda x: (x[:, :8, :8] + torch.randint(3, (1,)) + random.randint(0, 3)
    + numpy.random.randint(3)).to(torch.uint8)
floats = v2.ToDtype(torch.float32, scale=True)
larger = v2.Resize(9)
unseeded = lambda x: (drawn.append(0), x + len(drawn))[1]
def fails(image): raise KeyError("colour")
number = 3
"""


@pytest.mark.parametrize("name", ["good", "all_kinds"])
def test_transforms_of_ones_own(folder, name):
    (folder.parent / "own_transforms.py").write_text(OWN)
    config = config_of(folder, transform=f"own_transforms:{name}")
    images = load_images(config, 0).train_images
    first, second = (augment_batch(config, images, torch.Generator().manual_seed(3)) for _ in "ab")
    assert torch.equal(first, second)
    assert first.shape == images.shape
    other = augment_batch(config, images, torch.Generator().manual_seed(4))
    assert not torch.equal(first, other)
    changes = [not torch.equal(a, b) for a, b in zip(first, images, strict=True)]
    assert sum(changes) > 5
    streamed = load_images(config_of(folder, streaming=True, workers=0), 0).train_images
    view = View(transform=transform_of(config))
    assert view(streamed, (0, 1)).shape == (3, 8, 8)
    assert torch.equal(view(streamed, (0, 1)), view(streamed, (0, 1)))
    transform_of(config).check(images[0], 8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("floats", r"must return a tensor \(3, 8, 8\) of torch\.uint8, and returned .*float32"),
        ("larger", r"returned \(3, 9, 9\)"),
        ("unseeded", "random numbers that a seed does not fix"),
        ("fails", "fails for an image .*KeyError: 'colour'"),
        ("number", "is no function, but int"),
        ("missing", "cannot be imported"),
    ],
)
def test_transforms_that_cannot_be_used(folder, name, message):
    (folder.parent / "own_transforms.py").write_text(OWN)
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    with pytest.raises(OptionError, match=message):
        transform_of(config_of(folder, transform=f"own_transforms:{name}")).check(image, 8)
    with pytest.raises(OptionError, match="in place of crop and flip"):
        config_of(folder, transform="a:b", flip=False)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((3, 32, 32), 128), ((1, 28, 28), 167), ((1, 8, 8), 1024), ((3, 224, 224), 4)],
)
def test_batches_to_measure_on_take_little_memory(shape, size):
    images = torch.zeros(1, dtype=torch.uint8).expand(3, *shape)
    assert Batches(images, torch.zeros(3), lambda x: x).batch_size == min(size, 1024)
