"""Folders as people have them: both ways of loading give the same, and what is left out is said."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from gradmask.errors import DataError, GradmaskWarning
from gradmask.recipes.config import Comparison
from gradmask.recipes.data import sources
from gradmask.recipes.data.cache import cache_folder
from gradmask.recipes.data.folders import image_folder, warn_once
from gradmask.recipes.data.images import load_images
from gradmask.recipes.data.sources import decode_all, open_source, stored_source

CLASSES = ("ant", "bee", "cow")
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMASK_CACHE", str(tmp_path / "cache"))
    sources._stored_source.cache_clear()
    warn_once.cache_clear()


def picture(height=30, width=40, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    """Twelve images of each class to train on, three to test on."""
    for split, count in (("train", 36), ("val", 9)):
        for i in range(count):
            path = tmp_path / "photos" / split / CLASSES[i % 3] / f"{split}_{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(seed=i).save(path)
    return tmp_path / "photos"


def load_source(folder, size, **options):
    source = open_source(Comparison(data=folder, image_size=size, **options))
    (images, test_images), _ = decode_all(folder, [source.images, source.test_images])
    return replace(source, images=images, test_images=test_images)


def both_ways(folder, size=24, **options):
    """All images and labels, in memory and streamed."""
    stored = stored_source(
        Comparison(data=str(folder), streaming=True, image_size=size, workers=0, **options)
    )
    memory = load_source(str(folder), size, **options)
    sources._stored_source.cache_clear()
    assert memory.class_names == stored.class_names
    assert torch.equal(memory.labels, stored.labels)
    assert torch.equal(memory.test_labels, stored.test_labels)
    for ours, other in (
        (memory.images, stored.images),
        (memory.test_images, stored.test_images),
    ):
        every = torch.stack([other.centre(i) for i in range(len(other))])
        assert torch.equal(ours.expand(-1, 3, -1, -1), every)
    return memory, stored


def write_odd_files(folder):
    """Depths, orientations, modes and animations, among the others."""
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = RNG.integers(0, 65536, (30, 40))
    frames = {"save_all": True, "append_images": [picture(seed=50)]}
    clear = picture(seed=51)
    clear.putalpha(picture(seed=52).convert("L"))
    palette = picture(seed=53).quantize(9)
    images = {
        "deep.png": (Image.fromarray(deep.astype(np.uint16)), {}),
        "deep.tif": (Image.fromarray(deep.astype(np.uint16)), {}),
        "deeper.TIFF": (Image.fromarray(deep.astype(np.int32)), {}),
        "float.tiff": (Image.fromarray((deep / 65535).astype(np.float32)), {}),
        "turned.jpg": (picture(seed=54), {"exif": exif}),
        "turned.png": (picture(seed=55), {"exif": exif}),
        "turned.tif": (picture(seed=56), {"exif": exif}),
        "turned.webp": (picture(seed=57), {"exif": exif}),
        "clear.png": (clear, {}),
        "clear_grey.png": (clear.convert("LA"), {}),
        "palette.png": (palette, {"transparency": bytes(range(9))}),
        "cmyk.jpg": (picture(seed=58).convert("CMYK"), {}),
        "bits.png": (picture(seed=59).convert("1"), {}),
        "moves.png": (picture(seed=60), frames),
        "moves.gif": (picture(seed=61), frames),
        "moves.webp": (picture(seed=62), frames),
        "pages.tif": (picture(seed=63), {**frames, "exif": exif}),
    }
    for name, (image, options) in images.items():
        image.save(folder / "train" / "bee" / name, **options)
    shutil.copytree(folder / "train" / "bee", folder / "val" / "bee", dirs_exist_ok=True)
    return len(images)


def test_both_ways_give_the_same_pixels(folder):
    odd = write_odd_files(folder)
    memory, stored = both_ways(folder)
    assert len(memory.labels) == 36 + odd
    names = [os.path.basename(stored.images.name(i)) for i in range(len(memory.labels))]
    image = memory.images[names.index("deep.png")].double()
    assert 100 < image.mean() < 155  # neither black nor white
    assert torch.equal(memory.images[names.index("deep.tif")].double(), image)
    assert torch.equal(memory.images[names.index("deeper.TIFF")].double(), image)
    assert torch.equal(memory.images[names.index("float.tiff")].double(), image)
    assert len(memory.test_labels) == 9 + 12 + odd


def test_grey_images_to_train_on_and_colour_to_test_on(folder):
    for path in (folder / "train").rglob("*.png"):
        Image.open(path).convert("L").save(path)
    memory, _ = both_ways(folder)
    assert memory.images.shape == (36, 3, 24, 24)
    assert memory.test_images.shape == (9, 3, 24, 24)
    shutil.rmtree(folder / "val")
    memory, _ = both_ways(folder)
    assert memory.images.shape[1:] == (1, 24, 24)


@pytest.mark.parametrize(
    "pixels", [np.full((9, 9), 2, np.float32), np.full((9, 9), np.nan, np.float32)]
)
def test_pixels_out_of_range_are_named(folder, pixels):
    path = folder / "train" / "ant" / "a.tif"
    Image.fromarray(pixels).save(path)
    match = rf"Cannot decode {path}: its values .* must lie in 0 to 1\. Mend it, or .*damaged"
    with pytest.raises(DataError, match=match):
        load_source(str(folder), 24)
    with pytest.raises(DataError, match=match):
        both_ways(folder)
    with pytest.warns(GradmaskWarning, match=rf"1 damaged of 37 .* {path}: its values"):
        memory, _ = both_ways(folder, skip_damaged=True)
    assert len(memory.labels) == 36


def test_damaged_files_are_left_out_in_memory_too(folder):
    cut = folder / "train" / "bee" / "train_04.png"
    cut.write_bytes(cut.read_bytes()[:200])
    (folder / "val" / "cow" / "val_02.png").write_bytes(b"")
    for _ in range(2):
        warn_once.cache_clear()
        with pytest.warns(GradmaskWarning, match=r"1 damaged of \d+") as found:
            memory, stored = both_ways(folder, skip_damaged=True)
        assert len(found) == 2  # one a split, whichever the ways
        assert memory.labels.bincount().tolist() == [12, 11, 12]
        assert memory.test_labels.bincount().tolist() == [3, 3, 2]
        assert len(memory.images) == len(stored.images) == 35
        for path in cache_folder("damaged").iterdir():
            path.write_bytes(path.read_bytes()[:-3])  # made again


def link(path, target):
    path.symlink_to(target, target_is_directory=True)


def loops(folder):
    link(folder / "train" / "ant" / "self", ".")
    link(folder / "train" / "ant" / "up", "..")
    link(folder / "train" / "ant" / "top", folder)
    link(folder / "train" / "ant" / "root", folder.parent)
    link(folder / "train" / "ant" / "tests", "../../val")
    link(folder / "train" / "bee" / "other", "../ant")
    link(folder / "train" / "insects", "bee")
    link(folder / "val" / "again", "../train")
    outside = folder.parent / "outside"
    (outside / "deep").mkdir(parents=True)
    picture().save(outside / "deep" / "more.png")
    link(outside / "deep" / "back", outside)
    link(outside / "home", folder / "train" / "cow")
    link(folder / "train" / "cow" / "outside", outside)
    link(folder / "train" / "cow" / "twice", outside / "deep")


def test_links_back_into_the_folder_are_not_followed(folder):
    loops(folder)
    with pytest.warns(GradmaskWarning) as found:
        splits = image_folder(folder)
    assert len(found) == 1
    text = str(found[0].message)
    assert text.startswith(f"Left out of {folder}: 11 link into a folder that is listed (first: 't")
    assert splits["train"]["label"] == [0] * 12 + [1] * 12 + [2] * 13  # with what lies outside
    assert splits["train"].features["label"].names == list(CLASSES)
    assert len(splits["validation"]) == 9


def test_links_to_elsewhere_are_followed(folder):
    """Splits made of links to a folder of all images beside them, read through a link."""
    for split in ("train", "val"):
        move(folder / split, folder / "all" / split)
        (folder / split).mkdir()
        for name in CLASSES:
            link(folder / split / name, f"../all/{split}/{name}")
    link(folder.parent / "link", folder)
    splits = image_folder(folder.parent / "link")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 36, "validation": 9}
    (folder / "train" / "bee").unlink()
    (folder / "train" / "bee").mkdir()
    for path in (folder / "all" / "train" / "bee").iterdir():
        (folder / "train" / "bee" / path.name).symlink_to(path)
    assert len(image_folder(folder)["train"]) == 36


def test_what_is_left_out_is_said_in_one_line(folder):
    train = folder / "train"
    (train / "emu").mkdir()
    (train / "ant" / "._train_00.png").write_bytes(b"\0\5\26\7")
    (train / "ant" / ".DS_Store").write_bytes(b"x")
    (train / ".cache").mkdir()
    (train / "._ant.png").write_bytes(b"x")
    (train / "ant" / "Thumbs.db").write_bytes(b"x")
    (train / "notes.txt").write_text("ours")
    os.mkfifo(train / "ant" / "pipe.png")
    (train / "ant" / "gone.png").symlink_to("nowhere.png")
    (train / "ant" / "loop.png").symlink_to("loop.png")
    (train / "ant" / "inner").mkdir()
    name = b"caf\xe9\n.png"
    with open(os.path.join(os.fsencode(train / "ant"), name), "wb") as file:
        file.write((train / "ant" / "train_00.png").read_bytes())
    os.mkdir(os.path.join(os.fsencode(train), b"caf\xe9"))
    with pytest.warns(GradmaskWarning) as found:
        memory, _ = both_ways(folder)
    assert len(found) == 1
    assert memory.class_names == CLASSES
    assert len(memory.labels) == 36
    for message in found:
        text = str(message.message)
        assert "\n" not in text
        text.encode()
        for part in (
            "4 hidden (first: 'train/._ant.png')",
            "2 no image by its name (first: 'train/notes.txt')",
            "3 no file (a dangling link, pipe or device) (first: 'train/ant/gone.png')",
            "1 class without images (first: 'train/emu')",
            "2 name that is not UTF-8 (first: 'train/caf",
        ):
            assert part in text


def test_splits_in_any_capitals(folder):
    (folder / "train").rename(folder / "TRAINING")
    (folder / "val").rename(folder / "Test")
    splits = image_folder(folder)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 36, "test": 9}
    (folder / "TRAINING").rename(folder / "dogs")
    with pytest.raises(DataError, match="no folder train, only: test"):
        image_folder(folder)
    (folder / "dogs").rename(folder / "Train")
    (folder / "training").mkdir()
    with pytest.raises(DataError, match="two folders of train images, Train and training: merge"):
        image_folder(folder)


def move(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def stray(folder, split="train"):
    move(next((folder / split / "ant").iterdir()), folder / split / "stray.JPEG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (stray, r"train/stray\.JPEG has no label\. Every image must lie .*train/CLASS/NAME"),
        (lambda folder: stray(folder, "val"), r"val/stray\.JPEG has no label"),
        (lambda f: move(f / "train" / "ant", f / "train" / "wasp"), "class .* not in train: ant"),
        (lambda f: move(f / "train", f / "trains"), "no folder train, only: validation"),
        (lambda f: [move(f / s / "bee", f / f"b{s}") for s in ("train", "val")], None),
        (lambda f: [shutil.rmtree(f / "train" / c) for c in CLASSES[1:]], "holds 1 folder of cl"),
        (lambda f: [shutil.rmtree(f / "train" / c) for c in CLASSES], "holds no folders of class"),
        (lambda f: [shutil.rmtree(f / "val" / c) for c in CLASSES], "val has no images"),
    ],
)
def test_folders_that_are_not_by_class(change, message, folder):
    change(folder)
    for options in ({"streaming": True, "workers": 0}, {}):
        config = Comparison(data=str(folder), image_size=24, **options)
        sources._stored_source.cache_clear()
        if message is None:
            assert load_images(config, 0).class_names == ("ant", "cow")
            continue
        with pytest.raises(DataError, match=message):
            load_images(config, 0)


def test_what_a_folder_of_images_holds(folder):
    """Splits by their usual names, deeper folders, other files, a test split without labels."""
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "notes.txt").write_text("ours")
    move(folder / "train" / "ant" / "train_00.png", folder / "train" / "ant" / "b" / "c.png")
    (folder / "test").mkdir()
    shutil.copy(folder / "val" / "bee" / "val_01.png", folder / "test" / "unknown.JPEG")
    with pytest.warns(GradmaskWarning, match=r"1 without a label \(first: 'test/unknown\.JPEG'\)"):
        splits = image_folder(folder)
    shutil.rmtree(folder / "test")
    shutil.rmtree(folder / "train" / ".cache")
    (folder / "train" / "notes.txt").unlink()
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 36, "validation": 9}
    assert splits["train"]["label"] == [0] * 12 + [1] * 12 + [2] * 12
    assert splits["train"].features["label"].names == list(CLASSES)
    assert splits["train"][0]["image"].size  # opened by its path
    assert {s: len(rows) for s, rows in image_folder(folder / "train").items()} == {"train": 36}
    before = splits["train"]._fingerprint
    assert image_folder(folder)["train"]._fingerprint == before
    (folder / "train" / "bee" / "train_01.png").touch()
    assert image_folder(folder)["train"]._fingerprint != before
