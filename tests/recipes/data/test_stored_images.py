"""Images decoded as they are needed: what they look like, damaged ones, stopping and going on."""

import json
import multiprocessing
import os
import warnings
from dataclasses import replace
from io import StringIO

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from rich.console import Console
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from gradmask import cli
from gradmask.errors import DataError, GradmaskWarning, OptionError
from gradmask.fisher.sampling import random_samples
from gradmask.recipes.catalogue import find_recipe
from gradmask.recipes.compare import run_comparison
from gradmask.recipes.config import Comparison
from gradmask.recipes.data import batches as batches_module
from gradmask.recipes.data import cache as cache_module
from gradmask.recipes.data import sources, stored
from gradmask.recipes.data.batches import Batches, fisher_batches, training_batches
from gradmask.recipes.data.decoding import middle
from gradmask.recipes.data.folders import warn_once
from gradmask.recipes.data.images import load_images
from gradmask.recipes.data.sources import stored_source
from gradmask.recipes.data.transforms import Normalize
from gradmask.study.progress import Progress
from gradmask.study.world import ALONE, World

CLASSES = ("ant", "bee", "cow")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMASK_CACHE", str(tmp_path / "cache"))
    sources._stored_source.cache_clear()


@pytest.fixture
def folder(tmp_path):
    """JPEGs of many sizes and modes, as ImageNet has them."""
    rng = np.random.default_rng(0)
    modes = ("RGB", "RGB", "L", "CMYK", "RGB")
    for split, count in (("train", 36), ("val", 9)):
        for i in range(count):
            path = tmp_path / "photos" / split / CLASSES[i % 3] / f"{split}_{i:02}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = rng.integers(20, 90, 2)
            small = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            image = Image.fromarray(small).resize((int(width), int(height)), Image.BICUBIC)
            image.convert(modes[i % 5]).save(path, quality=90)
    return tmp_path / "photos"


def config_of(folder, **options):
    defaults = {"streaming": True, "image_size": 24, "workers": 2, "model": "small_cnn", "width": 4}
    return Comparison(data=str(folder), device="cpu", **(defaults | options))


def truncate(folder, name="train_07.JPEG"):
    path = next(folder.rglob(name))
    path.write_bytes(path.read_bytes()[:-200])
    return path


def test_decoded_as_torchvision_does(folder):
    source = stored_source(config_of(folder))
    assert source.class_names == CLASSES
    assert source.images.shape == (36, 3, 24, 24)
    assert source.test_images.shape == (9, 3, 24, 24)
    part = v2.Compose([v2.RandomResizedCrop(24), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    crops = []
    for i in range(36):
        path = folder / "train" / CLASSES[int(source.labels[i])]
        # The rows are in the order of the files.
        found = sorted(path.iterdir())[i % 12]
        image = Image.open(found).convert("RGB")
        assert torch.equal(source.images.centre(i), transforms.pil_to_tensor(middle(image, 24)))
        torch.manual_seed(5)
        expected = part(image)
        state = torch.get_rng_state()
        assert torch.equal(source.images.cropped(i, 5), expected)
        assert torch.equal(torch.get_rng_state(), state)
        crops.append(source.images.cropped(0, i))
    assert len({crop.numpy().tobytes() for crop in crops}) == 36


def test_measured_batches_and_parts_of_processes(folder):
    data = load_images(config_of(folder, validation=0.25), 0)
    assert (len(data.train_labels), len(data.val_labels), len(data.test_labels)) == (27, 9, 9)
    prepare = Normalize.of(data.train_images)
    whole = torch.stack([data.train_images.centre(i) for i in range(27)])
    expected = transforms.normalize(
        whole.float() / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    every = Batches(data.train_images, data.train_labels, prepare, 10)
    inputs, labels = (torch.cat(parts) for parts in zip(*every, strict=True))
    torch.testing.assert_close(inputs, expected)
    assert torch.equal(labels, data.train_labels)
    for rank in range(3):
        own = replace(every, world=World(rank, 3))
        for batch, (x, y) in zip(torch.arange(27).split(10), own, strict=True):
            torch.testing.assert_close(x, expected[batch[rank::3]])
            assert torch.equal(y, data.train_labels[batch[rank::3]])
        loader = fisher_batches(own)
        x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
        torch.testing.assert_close(x, expected[rank::3])
        assert torch.equal(y, data.train_labels[rank::3])


def test_a_part_for_the_fisher_pass_is_all_that_is_decoded(folder, monkeypatch):
    data = load_images(config_of(folder, workers=0), 0)
    loader = fisher_batches(Batches(data.train_images, data.train_labels, lambda x: x, 8))
    opened = []
    original = stored.StoredImages.open
    monkeypatch.setattr(
        stored.StoredImages, "open", lambda self, i: (opened.append(i), original(self, i))[1]
    )
    assert sum(len(y) for _, y in random_samples(loader, 5, 0)) == 5
    assert len(opened) == 5


@pytest.mark.parametrize("augment", [True, False])
def test_training_batches_depend_on_the_seed_alone(folder, augment):
    config = config_of(folder, augment=augment)
    data = load_images(config, 0)
    places = list(torch.randperm(len(data.train_labels)).tensor_split(4))

    def batches(workers=0, first=0, crops=(0, "crops", 1), world=ALONE):
        images = replace(data.train_images, workers=workers)
        changed = replace(data, train_images=images)
        generator = torch.Generator()
        options = {"crops": crops, "prepare": lambda x: x, "world": world}
        return list(training_batches(config, changed, places[first:], generator, **options))

    whole = batches()
    for found in (batches(2), batches(3, first=2)):
        for (x, y), (expected, labels) in zip(found[::-1], whole[::-1], strict=False):
            assert torch.equal(x, expected)
            assert torch.equal(y, labels)
    for rank in range(2):
        for (x, y), (expected, labels) in zip(batches(world=World(rank, 2)), whole, strict=True):
            assert torch.equal(x, expected[rank::2])
            assert torch.equal(y, labels[rank::2])
    other = batches(crops=(0, "crops", 2))
    assert torch.equal(other[0][0], whole[0][0]) != augment
    for (_, y), batch in zip(whole, places, strict=True):
        assert torch.equal(y, data.train_labels[batch])


def test_every_image_of_every_epoch_has_a_seed_of_its_own(folder, monkeypatch):
    config = config_of(folder)
    data = load_images(config, 0)
    seen = []

    def record(images, keys, *_):
        seen.extend(seed for batch in keys for _, seed in batch)
        return iter([])

    monkeypatch.setattr(batches_module, "decoded", record)
    places = [torch.arange(len(data.train_labels))]
    for crops in ((0, "crops", 1), (0, "crops", 2), (1, "crops", 1)):
        options = {"crops": crops, "prepare": lambda x: x, "world": ALONE}
        with pytest.raises(ValueError, match="shorter"):
            next(training_batches(config, data, places, torch.Generator(), **options))
    assert len(set(seen)) == len(seen) == 3 * len(data.train_labels)


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_random_state(folder, workers):
    """Or a run with dropout would go on otherwise than if it had not been interrupted."""
    config = config_of(folder, workers=workers)
    data = load_images(config, 0)
    state = torch.get_rng_state()
    places = [torch.arange(len(data.train_labels))]
    options = {"crops": (0,), "prepare": lambda x: x, "world": ALONE}
    list(training_batches(config, data, places, torch.Generator(), **options))
    every = Batches(data.train_images, data.train_labels, lambda x: x)
    list(every)
    list(fisher_batches(replace(every, size=4)))
    stored.damaged(data.val_images)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_file_is_named(folder, workers):
    path = truncate(folder)
    config = config_of(folder, workers=workers, epochs=1, arms=("none",), seeds=(0,))
    config = replace(config, output=folder.parent / "out", validation=0.1)
    with pytest.raises(DataError, match=rf"Cannot decode {path}: .*--skip_damaged true") as error:
        compare(config)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_damaged_file_is_named_in_a_fisher_pass(folder, workers, monkeypatch):
    path = truncate(folder)
    config = config_of(folder, workers=workers, epochs=2, arms=("fisher",), seeds=(0,))
    config = replace(config, output=folder.parent / "out", fisher_samples=None)
    train = stored.StoredImages.cropped
    monkeypatch.setattr(  # the training batches go well
        stored.StoredImages, "cropped", lambda self, i, *rest: train(self, 0, *rest)
    )
    with pytest.raises(DataError, match=rf"^Cannot decode {path}: .*true\.$"):
        compare(config)


def bomb(folder):
    """A few hundred bytes that say they are 60,000 x 60,000 pixels."""
    path = folder / "train" / "ant" / "train_00.JPEG"
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = (60_000).to_bytes(2, "big") * 2
    path.write_bytes(data)
    return path


def test_a_header_that_claims_too_many_pixels(folder):
    path = bomb(folder)
    with pytest.raises(DataError, match=rf"Cannot decode {path}: .*decompression bomb"):
        stored_source(config_of(folder)).images.centre(0)
    with pytest.raises(DataError, match=rf"Cannot decode {path}: .*decompression bomb"):
        load_images(Comparison(data=str(folder), image_size=24), 0)
    sources._stored_source.cache_clear()
    with pytest.warns(GradmaskWarning, match="1 damaged of 36"):
        assert len(stored_source(config_of(folder, skip_damaged=True)).images) == 35


def die(self, place, *_):
    os._exit(1)


@pytest.mark.parametrize("moment", ["cropped", "centre"])
def test_a_lost_worker_ends_the_run_by_name(folder, moment, monkeypatch):
    monkeypatch.setattr(stored.StoredImages, moment, die)
    config = config_of(folder, workers=1, epochs=2, arms=("fisher",), seeds=(0,))
    with pytest.raises(DataError, match=r"lost or cannot start .*try fewer --workers"):
        compare(replace(config, output=folder.parent / "out"))


def test_a_worker_that_cannot_start(folder, monkeypatch):
    def start(self):
        raise OSError(12, "Cannot allocate memory")

    images = stored_source(config_of(folder)).images
    monkeypatch.setattr(multiprocessing.Process, "start", start)
    with pytest.raises(DataError, match=r"Cannot allocate memory.*try fewer --workers"):
        list(stored.damaged(images))


def test_other_errors_stay_as_they_are():
    for error in (RuntimeError("shapes differ"), DataError("diverged"), OSError("disk full")):
        with pytest.raises(type(error), match=str(error)), stored.worker_errors():
            raise error


def test_damaged_files_are_left_out_on_request(folder, monkeypatch):
    paths = truncate(folder), truncate(folder, "val_01.JPEG")
    empty = folder / "train" / "bee" / "train_04.JPEG"
    empty.write_bytes(b"")
    with pytest.warns(GradmaskWarning) as found:
        source = stored_source(config_of(folder, skip_damaged=True))
    texts = [str(w.message) for w in found if w.category is GradmaskWarning]
    assert "2 damaged of 36 images" in texts[0]
    assert "1 damaged of 9 images" in texts[1]
    assert str(paths[1]) in texts[1]
    assert (len(source.images), len(source.labels)) == (34, 34)
    assert len(source.test_images) == len(source.test_labels) == 8
    classes = [
        next(row[source.images.column]["path"] for row in [source.images.rows[int(i)]])
        for i in source.images.indices
    ]
    assert [CLASSES.index(path.split("/")[-2]) for path in classes] == source.labels.tolist()
    for i in range(34):
        source.images.centre(i)
    # Found once for these files.
    sources._stored_source.cache_clear()
    warn_once.cache_clear()
    monkeypatch.setattr(cache_module, "damaged", None)
    with pytest.warns(GradmaskWarning):
        stored_source(config_of(folder, skip_damaged=True))


def test_parquet_with_bytes(tmp_path):
    from image_files import pictures, write_parquet

    write_parquet(tmp_path / "p", "train", pictures(9, 30), [0, 1, 2] * 3)
    write_parquet(tmp_path / "p", "test", pictures(3, 40), [0, 1, 2])
    data = load_images(config_of(tmp_path / "p", validation=0.34), 0)
    x, _ = next(iter(Batches(data.test_images, data.test_labels, lambda x: x)))
    assert x.shape == (3, 3, 24, 24)
    rows = data.test_images.rows
    assert "image 0 of" in str(_error_of(data.test_images, rows))


def test_a_test_split_without_labels_is_passed_over(tmp_path):
    """As ImageNet has it on the hub: the labels of its test images are -1."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature
    from image_files import pictures

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b", "c"])})
    (tmp_path / "p").mkdir()
    for split, labels in (("train", [0, 1, 2] * 4), ("validation", [2, 0]), ("test", [-1] * 5)):
        images = [Image.fromarray(array) for array in pictures(len(labels), 30)]
        rows = Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(tmp_path / "p" / f"{split}-0.parquet")
    for options in ({"streaming": True, "workers": 0}, {}):
        config = Comparison(data=str(tmp_path / "p"), image_size=24, validation=0.25, **options)
        assert load_images(config, 0).test_labels.tolist() == [2, 0]


def _error_of(images, rows):
    class Broken:
        data = pyarrow.table(
            {images.column: [{"bytes": rows[0][images.column]["bytes"][:60], "path": None}]}
        )

    with pytest.raises(DataError) as error:
        replace(images, rows=Broken()).centre(0)
    return error.value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": None}, "streaming needs an image_size"),
        ({"data": "digits"}, "is not for digits|other data than digits"),
        ({"monitor": ("kl",)}, "monitor needs images in memory"),
        ({"streaming": False}, "options? of streaming"),
        ({"workers": -1}, "workers=-1"),
    ],
)
def test_options(options, message):
    defaults = {"data": "x", "streaming": True, "image_size": 24, "workers": 1}
    with pytest.raises(OptionError, match=message):
        Comparison(**(defaults | options))


def compare(config):
    return run_comparison(config, Progress(Console(file=StringIO())))


def rows(folder):
    lines = next(folder.glob("runs/fisher*")).joinpath("metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in lines]


def test_the_recipe_stops_and_goes_on_with_the_same_bits(folder, tmp_path, monkeypatch, capsys):
    assert find_recipe("table1-imagenet").config("paper").image_size == 224
    words = ["run", "table1-imagenet", "--data", str(folder), "--image_size", "16", "--model"]
    words += ["cifar_resnet10", "--width", "4", "--epochs", "3", "--seeds", "0", "--workers", "1"]
    words += ["--arms", "fisher:keep=0.25", "--batch_size", "8", "--checkpoint_every", "1"]
    words += ["--fisher_samples", "10", "--device", "cpu", "--output"]
    assert cli.main([*words, str(tmp_path / "whole")]) == 0
    assert cli.main([*words, str(tmp_path / "out"), "--stop_after", "1"]) == 75
    # In the middle of an epoch; what was decoded ahead is lost and decoded again.
    original, count = batches_module.decoded, 0

    def interrupted(images, keys, *rest):
        nonlocal count
        for batch in original(images, keys, *rest):
            count += 1
            if count == 3:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(batches_module, "decoded", interrupted)
        assert cli.main([*words, str(tmp_path / "out")]) == 130
    assert cli.main([*words, str(tmp_path / "out")]) == 0
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")


def test_streamed_data_elsewhere(folder, tmp_path):
    config = config_of(folder, epochs=1, arms=("none",), seeds=(0,), save_every=1)
    config = replace(config, output=tmp_path / "out", label_noise=0.3, validation=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GradmaskWarning)
        results = compare(config)
    assert "memorised" in results["runs"][0]["epochs"][0]
    assert cli.main(["audit", str(tmp_path / "out")]) == 0
    assert cli.main(["audit", str(tmp_path / "out"), "--by=influence"]) == 2
