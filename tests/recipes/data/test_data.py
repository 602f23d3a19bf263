from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import pictures, rows, write_folder, write_parquet

from gradmask.errors import DataError
from gradmask.recipes.config import Comparison
from gradmask.recipes.data import cache as cache_module
from gradmask.recipes.data import sources
from gradmask.recipes.data.images import load_images
from gradmask.recipes.data.transforms import (
    augment,
    augment_batch,
    channel_statistics,
    normalize,
)

CIFAR100 = Path(__file__).resolve().parents[4] / "shared" / "data" / "cifar100"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMASK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_digits_are_whole_and_fixed_over_seeds():
    first, second = (load_images(Comparison(label_noise=0.5), seed) for seed in (0, 1))
    assert first.train_images.shape[1:] == (1, 8, 8)
    assert first.train_images.dtype == torch.uint8
    assert first.train_images.max() == 255
    assert first.train_labels.dtype == torch.int64
    parts = [first.train_images, first.val_images, first.test_images]
    assert [len(part) for part in parts] == [1438 - 144, 144, 359]
    for name in ("train_images", "train_clean_labels", "val_images", "test_images"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert not torch.equal(first.train_labels, second.train_labels)


def test_digits_keep_images_with_their_labels():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    truth = {(p / 16).tobytes(): y for p, y in zip(pixels, labels, strict=True)}
    data = load_images(Comparison(), 0)
    seen = []
    for images, targets in (
        (data.train_images, data.train_labels),
        (data.val_images, data.val_labels),
        (data.test_images, data.test_labels),
    ):
        for image, target in zip(images, targets, strict=True):
            key = ((image.double() * 16 / 255).round() / 16).flatten().numpy().tobytes()
            assert truth[key] == target
            seen.append(key)
    assert sorted(seen) == sorted((p / 16).tobytes() for p in pixels)  # disjoint and complete


@pytest.mark.parametrize(("train_size", "validation"), [(500, 0.2), (1000, 0.1)])
def test_subset_and_validation_are_stratified(train_size, validation):
    everything = load_images(Comparison(), 0)
    data = load_images(Comparison(train_size=train_size, validation=validation), 0)
    held_out = round(train_size * validation)
    assert (len(data.train_labels), len(data.val_labels)) == (train_size - held_out, held_out)
    all_labels = torch.cat([everything.train_labels, everything.val_labels])
    shares = all_labels.bincount() / len(all_labels)
    for labels in (data.train_labels, data.val_labels, data.test_labels):
        assert (labels.bincount(minlength=10) - shares * len(labels)).abs().max() <= 1.5
    assert torch.equal(data.test_images, everything.test_images)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_noise_replaces_an_exact_number_by_different_classes(share):
    data = load_images(Comparison(label_noise=share), 3)
    changed = data.train_labels != data.train_clean_labels
    assert changed.sum() == round(share * len(changed))
    assert torch.equal(
        data.train_labels, load_images(Comparison(label_noise=share), 3).train_labels
    )
    assert torch.equal(data.val_labels, load_images(Comparison(), 0).val_labels)
    if share == 1.0:
        offsets = ((data.train_labels - data.train_clean_labels) % 10).bincount(minlength=10)
        expected = len(changed) / 9
        assert offsets[0] == 0
        assert (offsets[1:] - expected).abs().max() < 5 * expected**0.5


def test_choice_of_classes_is_relabelled_and_the_same_for_all_seeds():
    data = load_images(Comparison(classes=3, label_noise=0.5), 5)
    assert data.class_names == load_images(Comparison(classes=3), 0).class_names
    everything = load_images(Comparison(), 0)
    names = dict(zip(rows(everything.test_images), everything.test_labels.tolist(), strict=True))
    for image, label in zip(rows(data.test_images), data.test_labels, strict=True):
        assert data.class_names[label] == str(names[image])
    for labels in (data.train_labels, data.val_labels, data.test_labels):
        assert labels.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"train_size": 2000}, "train_size=2000 is more than the 1438"),
        ({"classes": 11}, "classes=11 is more than the 10"),
        ({"train_size": 5}, "Cannot take 5 of 1438"),
        ({"classes": 1, "train_size": 10, "validation": 0.01}, "on and 0 to validate on"),
        ({"classes": 1, "label_noise": 0.5}, "at least 2 classes"),
    ],
)
def test_impossible_choices(options, match):
    with pytest.raises(DataError, match=match):
        load_images(Comparison(**options), 0)


def test_parquet_is_decoded_once(tmp_path, cache, monkeypatch):
    train, test = pictures(30), pictures(9, seed=1)
    train_labels, test_labels = [i % 3 for i in range(30)], [i % 3 for i in range(9)]
    write_parquet(tmp_path / "set", "train", train, train_labels)
    write_parquet(tmp_path / "set", "test", test, test_labels)
    config = Comparison(data=str(tmp_path / "set"))
    data = load_images(config, 0)
    assert data.class_names == ("a", "b", "c")
    assert torch.equal(data.test_images, torch.from_numpy(test).permute(0, 3, 1, 2))
    assert data.test_labels.tolist() == test_labels
    truth = {a.transpose(2, 0, 1).tobytes(): y for a, y in zip(train, train_labels, strict=True)}
    images = rows(data.train_images) + rows(data.val_images)
    labels = data.train_labels.tolist() + data.val_labels.tolist()
    assert dict(zip(images, labels, strict=True)) == truth
    assert len(images) == 30

    cached = list((cache / "images").iterdir())
    assert [p.suffix for p in cached] == [".pt"] * 3
    monkeypatch.setattr(cache_module, "_decode", None)
    assert torch.equal(load_images(config, 0).train_images, data.train_images)
    monkeypatch.undo()
    monkeypatch.setenv("GRADMASK_CACHE", str(cache))
    for path, cut in zip(cached, (0, -9, 9), strict=True):  # damaged ones are made again
        path.write_bytes(path.read_bytes()[:cut])
    assert torch.equal(load_images(config, 0).train_images, data.train_images)
    assert all(len(path.read_bytes()) > 9 for path in cached)


def test_changed_files_are_decoded_again(tmp_path):
    labels = [i % 3 for i in range(30)]
    for seed in (0, 1):
        write_parquet(tmp_path / "set", "train", pictures(30, seed=seed), labels)
        write_parquet(tmp_path / "set", "test", pictures(9, seed=seed + 5), labels[:9])
        data = load_images(Comparison(data=str(tmp_path / "set")), 0)
        expected = torch.from_numpy(pictures(9, seed=seed + 5)).permute(0, 3, 1, 2)
        assert torch.equal(data.test_images, expected)


def test_image_folder_without_test_split_gives_up_a_fifth(tmp_path):
    write_folder(tmp_path / "set", pictures(50, mode="L"))
    data = load_images(Comparison(data=str(tmp_path / "set")), 0)
    assert data.class_names == ("cat", "dog")
    assert data.test_labels.bincount().tolist() == [5, 5]
    assert (len(data.train_images), len(data.val_images)) == (36, 4)
    every = rows(data.train_images) + rows(data.val_images) + rows(data.test_images)
    assert sorted(every) == sorted(a.tobytes() for a in pictures(50, mode="L"))


def test_images_of_different_sizes_need_image_size(tmp_path):
    root = write_folder(tmp_path / "set", [*pictures(20), *pictures(20, size=9)])
    with pytest.raises(DataError, match=r"\d\.png is 9 x 9 pixels, not 6 x 6: .*--image-size"):
        load_images(Comparison(data=str(root)), 0)
    data = load_images(Comparison(data=str(root), image_size=7), 0)
    assert data.train_images.shape[1:] == (3, 7, 7)


def test_grey_images_among_colour_images_become_colour(tmp_path):
    grey = pictures(20, mode="L")
    root = write_folder(tmp_path / "set", [*grey, *pictures(20)])
    data = load_images(Comparison(data=str(root)), 0)
    every = rows(data.train_images) + rows(data.val_images) + rows(data.test_images)
    assert np.stack([grey[3]] * 3).tobytes() in every


def test_undecodable_image_is_named(tmp_path):
    root = write_folder(tmp_path / "set", pictures(40))
    (root / "train" / "cat" / "004.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"Cannot decode .*cat/004\.png: .*--skip_damaged true"):
        load_images(Comparison(data=str(root)), 0)


def test_parquet_without_train_file_or_labels(tmp_path):
    from datasets import Dataset

    write_parquet(tmp_path / "set", "test", pictures(9), [i % 3 for i in range(9)])
    with pytest.raises(DataError, match=r"none is named train\*"):
        load_images(Comparison(data=str(tmp_path / "set")), 0)
    Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "set" / "train.parquet")
    (tmp_path / "set" / "test-0.parquet").unlink()
    with pytest.raises(DataError, match=r"no image column\. Its columns: text"):
        load_images(Comparison(data=str(tmp_path / "set")), 0)


def test_normalize_gives_mean_zero_and_deviation_one():
    images = torch.randint(0, 200, (64, 3, 5, 5), dtype=torch.uint8)
    images[:, 2] = 17  # a constant channel
    mean, std = channel_statistics(images)
    floats = images.double() / 255
    torch.testing.assert_close(mean.double(), floats.mean((0, 2, 3)), atol=1e-6, rtol=0)
    expected = floats.std((0, 2, 3), correction=0)
    torch.testing.assert_close(std.double(), expected, atol=1e-6, rtol=0)
    result = normalize(images, mean, std)
    assert result.dtype == torch.float32
    assert result.mean((0, 2, 3)).abs().max() < 1e-4
    assert (result.std((0, 2, 3), correction=0) - torch.tensor([1.0, 1.0, 0.0])).abs().max() < 1e-4


@pytest.mark.parametrize(("padding", "flip"), [(4, True), (2, False), (0, True)])
def test_each_image_is_some_window_of_its_own_padded_image(padding, flip):
    # Values 1 to 255 without zeros: each window is found at exactly one place.
    images = torch.randint(1, 256, (200, 3, 8, 6), dtype=torch.uint8)
    result = augment(images, torch.Generator().manual_seed(0), padding, flip)
    assert result.shape == images.shape
    assert result.dtype == torch.uint8
    places = set()
    for image, changed in zip(images, result, strict=True):
        padded = torch.zeros(3, 8 + 2 * padding, 6 + 2 * padding, dtype=torch.uint8)
        padded[:, padding : padding + 8, padding : padding + 6] = image
        found = [
            (top, left, mirrored)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
            for mirrored in (False, True)
            if torch.equal(
                changed.flip(2) if mirrored else changed,
                padded[:, top : top + 8, left : left + 6],
            )
        ]
        assert len(found) == 1
        places.add(found[0])
    offsets = set(range(2 * padding + 1))
    assert {place[0] for place in places} == offsets
    assert {place[1] for place in places} == offsets
    assert {place[2] for place in places} == ({False, True} if flip else {False})
    assert len(places) > len(offsets) or padding == 0  # rows and columns move on their own


def test_augmentation_is_seeded():
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)
    first, second, third = (augment(images, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_digits_are_moved_by_one_pixel_and_never_mirrored():
    images = torch.randint(1, 256, (50, 1, 8, 8), dtype=torch.uint8)
    result = augment_batch(Comparison(), images, torch.Generator().manual_seed(0))
    assert torch.equal(
        result, augment(images, torch.Generator().manual_seed(0), padding=1, flip=False)
    )
    off = Comparison(augment=False)
    assert augment_batch(off, images, torch.Generator()) is images
    other = augment_batch(Comparison(data="cifar"), images, torch.Generator().manual_seed(0))
    assert torch.equal(other, augment(images, torch.Generator().manual_seed(0)))


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR100.is_dir(), reason="CIFAR-100 is not in ../shared/data/cifar100")
def test_cifar100():
    config = Comparison(data=str(CIFAR100), label_noise=0.2)
    data = load_images(config, 0)
    assert data.train_images.shape == (45_000, 3, 32, 32)
    assert data.val_labels.bincount().tolist() == [50] * 100
    assert data.test_labels.bincount().tolist() == [100] * 100
    assert (data.train_labels != data.train_clean_labels).sum() == 9000
    assert data.class_names[:2] == ("apple", "aquarium_fish")
    mean, std = channel_statistics(data.train_images)  # the known values of CIFAR-100
    torch.testing.assert_close(mean, torch.tensor([0.507, 0.487, 0.441]), atol=3e-3, rtol=0)
    torch.testing.assert_close(std, torch.tensor([0.267, 0.256, 0.276]), atol=3e-3, rtol=0)


@pytest.mark.skipif(not CIFAR100.is_dir(), reason="CIFAR-100 is not in ../shared/data/cifar100")
def test_cifar100_columns():
    import pyarrow.parquet
    from datasets import Features

    schema = pyarrow.parquet.read_schema(CIFAR100 / "test-00000-of-00001.parquet")
    features = Features.from_arrow_schema(schema)
    assert sources._columns("cifar100", features) == ("img", "fine_label")


@pytest.mark.parametrize("noise", ["symmetric", "asymmetric"])
def test_noisy_validation_is_wrong_as_training_is(noise):
    config = Comparison(data="digits", label_noise=0.3, noise=noise, validation=0.3)
    clean, noisy = load_images(config, 0), load_images(replace(config, noisy_validation=True), 0)
    assert torch.equal(clean.train_labels, noisy.train_labels)
    assert torch.equal(clean.test_labels, noisy.test_labels)
    wrong = noisy.val_labels != clean.val_labels
    assert int(wrong.sum()) == round(0.3 * len(wrong))
    if noise == "asymmetric":  # to the same classes as in training
        trained = noisy.train_labels != noisy.train_clean_labels
        goes = {
            (int(a), int(b))
            for a, b in zip(
                noisy.train_clean_labels[trained], noisy.train_labels[trained], strict=True
            )
        }
        found = zip(clean.val_labels[wrong].tolist(), noisy.val_labels[wrong].tolist(), strict=True)
        assert set(found) <= goes
    again = load_images(replace(config, noisy_validation=True), 1)
    assert not torch.equal(again.val_labels, noisy.val_labels)
