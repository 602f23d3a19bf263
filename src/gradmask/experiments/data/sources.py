"""Where images come from: the embedded digits, local folders and the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from gradmask.errors import DataError, GradmaskWarning, OptionError
from gradmask.experiments.config import Comparison
from gradmask.experiments.data.folders import image_folder
from gradmask.experiments.data.stored import UNREADABLE, StoredImages, damaged, default_workers
from gradmask.experiments.files import write_atomically

# Classes, subset and held-out images must not change with the run's seed: all runs of a
# comparison are then measured on the same images.
SPLIT_SEED = 0
TEST_SHARE = 0.2
SPLITS = ("train", "test", "validation")
Images: TypeAlias = Tensor | StoredImages


@dataclass(frozen=True)
class Source:
    """Everything a data set holds, before any choice is made.

    Attributes:
        images: Training images, uint8, NCHW, in memory or stored.
        labels: Their labels, int64.
        test_images: Test images of the same size.
        test_labels: Their labels.
        class_names: Name of each label.
    """

    images: Images
    labels: Tensor
    test_images: Images
    test_labels: Tensor
    class_names: tuple[str, ...]


def load_source(name: str, image_size: int | None = None) -> Source:
    """Load all images of a data set, decoded once and cached.

    The cache lies in `~/.cache/gradmask`, or where the environment variable `GRADMASK_CACHE` says.

    Args:
        name: `digits`, a folder of parquet files named `train*` and `test*` (or `validation*`), a
            folder of images by class, or a name on the Hugging Face hub.
        image_size: Resize images to this many pixels.

    Returns:
        Training and test images. Without a test split (or a validation split to use as one), a
        fixed stratified 20 % of the images.

    Raises:
        DataError: If the data cannot be found or decoded.
    """
    if name == "digits":
        return _digits(image_size)
    return _source(name, lambda rows, column, where: _decoded(rows, column, image_size, where))


def stored_source(config: Comparison) -> Source:
    """Find all images of a data set, and leave them where they are.

    Args:
        config: Options of the comparison: `data`, `image_size`, `workers` and `skip_damaged`.

    Returns:
        Training and test images, as by `load_source`.

    Raises:
        DataError: If the data cannot be found.
    """
    workers = default_workers() if config.workers is None else config.workers
    assert config.image_size is not None  # checked with the options
    return _stored_source(config.data, config.image_size, workers, config.skip_damaged)


@lru_cache(maxsize=1)  # every run of a comparison asks for the same
def _stored_source(name: str, size: int, workers: int, skip_damaged: bool) -> Source:
    def read(rows: Any, column: str, where: str) -> StoredImages:
        import datasets

        rows = rows.select_columns(column).cast_column(column, datasets.Image(decode=False))
        images = StoredImages(rows, column, where, torch.arange(len(rows)), size, workers)
        return images[_sound(images)] if skip_damaged else images

    return _source(name, read)


def _sound(images: StoredImages) -> Tensor:
    """Places of the images that can be decoded; found once for a data set, and cached."""
    path = _cache("damaged") / f"{_key(images.rows, images.column)}.json"
    if not path.exists():
        write_atomically(path, json.dumps(damaged(images)))
    found = dict(json.loads(path.read_text(encoding="utf-8")))
    if found:
        first = next(iter(found.values())).split(". Mend it")[0]
        warnings.warn(
            f"{len(found)} damaged of {len(images)} images of {images.where} are left out. "
            f"The first: {first}",
            GradmaskWarning,
            stacklevel=2,
        )
    return torch.tensor([row for row in range(len(images)) if row not in found])


def in_memory(images: Images) -> Tensor:
    """The images, or an OptionError if they are stored."""
    if isinstance(images, StoredImages):
        raise OptionError(
            f"{images.where} is not in memory, as this needs it: leave streaming out."
        )
    return images


def stratified(labels: Tensor, indices: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Split indices into `size` of them and the rest, both with all classes in proportion.

    Args:
        labels: Labels of all images.
        indices: The images to split.
        size: How many to choose.

    Returns:
        The chosen indices and the rest, each sorted; the same ones every time.

    Raises:
        DataError: If a class has too few images to be split.
    """
    if size in (0, len(indices)):
        return indices[:size], indices[size:]
    try:
        parts = train_test_split(
            indices.numpy(),
            train_size=size,
            stratify=labels[indices].numpy(),
            random_state=SPLIT_SEED,
        )
    except ValueError as error:
        raise DataError(f"Cannot take {size} of {len(indices)} images by class: {error}") from error
    chosen, rest = (torch.from_numpy(np.sort(part)) for part in parts)
    return chosen, rest


def _digits(image_size: int | None) -> Source:
    pixels, targets = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels * 255 / 16).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    if image_size is not None:
        images = transforms.resize(images, [image_size, image_size])
    names = tuple(str(digit) for digit in range(10))
    return _with_test_split(images, torch.from_numpy(targets).long(), names)


def _source(name: str, read: Callable[[Any, str, str], Images]) -> Source:
    splits = _open(name)
    if "train" not in splits:
        raise DataError(f"{name} has no train split, only: {', '.join(splits)}.")
    image_column, label_column = _columns(name, splits["train"].features)
    test_name = next(
        (s for s in ("test", "validation") if _labelled(splits, s, label_column)), None
    )
    raw = np.asarray(splits["train"][label_column])
    names = getattr(splits["train"].features[label_column], "names", None)
    known = np.unique(raw) if names is None else np.arange(len(names))
    class_names = tuple(str(value) for value in (known if names is None else names))
    images = read(splits["train"], image_column, f"{name} (train)")
    labels = _of_images(_label_indices(raw, known, f"{name} (train)"), images)
    if test_name is None:
        return _with_test_split(images, labels, class_names)
    where = f"{name} ({test_name})"
    test_raw = np.asarray(splits[test_name][label_column])
    test_images = read(splits[test_name], image_column, where)
    if images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"Images of {name} differ between train {tuple(images.shape[1:])} and {test_name} "
            f"{tuple(test_images.shape[1:])}: give one size with --image-size, and one colour mode."
        )
    test_labels = _of_images(_label_indices(test_raw, known, where), test_images)
    return Source(images, labels, test_images, test_labels, class_names)


def _labelled(splits: Any, split: str, label_column: str) -> bool:
    """Whether a split is there with its labels; those of ImageNet's test images are all -1."""
    if split not in splits:
        return False
    labels = np.asarray(splits[split][label_column])
    return not (np.issubdtype(labels.dtype, np.number) and len(labels) and (labels == -1).all())


def _of_images(labels: Tensor, images: Images) -> Tensor:
    return labels[images.indices] if isinstance(images, StoredImages) else labels


def _open(name: str) -> Any:
    import datasets  # slow to import, and the embedded digits do not need it

    path = Path(name).expanduser()
    if not (path.exists() or path.is_absolute() or name.startswith((".", "~"))):
        options: dict[str, Any] = {"path": name}
    elif not path.is_dir():
        raise DataError(f"No folder at {path}: data must be a folder, a hub name or 'digits'.")
    elif any(path.glob("*.parquet")):
        found = {s: sorted(map(str, path.glob(f"{s}*.parquet"))) for s in SPLITS}
        files = {split: paths for split, paths in found.items() if paths}
        options = {"path": "parquet", "data_files": files, "cache_dir": str(_cache("datasets"))}
        if "train" not in files:
            raise DataError(f"{path} holds parquet files, but none is named train*.parquet.")
    else:
        return image_folder(path)
    try:
        return datasets.load_dataset(**options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        missing = "" if path.exists() else "there is no such local folder, and the hub fails: "
        raise DataError(f"Cannot load {name!r}: {missing}{error}") from error


def _columns(name: str, features: Any) -> tuple[str, str]:
    import datasets

    images = [key for key, value in features.items() if isinstance(value, datasets.Image)]
    classes = [key for key, value in features.items() if isinstance(value, datasets.ClassLabel)]
    labels = [key for key in ("label", "fine_label") if key in features] + classes
    if not images or not labels:
        kind = "image" if not images else "label"
        raise DataError(f"{name} has no {kind} column. Its columns: {', '.join(features)}.")
    return images[0], labels[0]


def _label_indices(raw: NDArray[Any], known: NDArray[Any], where: str) -> Tensor:
    unknown = np.flatnonzero(~np.isin(raw, known))
    if len(unknown):
        index = int(unknown[0])
        raise DataError(f"Label {raw[index]} of image {index} of {where} is not a known class.")
    return torch.from_numpy(np.searchsorted(known, raw)).long()


def _decoded(split: Any, column: str, image_size: int | None, where: str) -> Tensor:
    key = _key(split, column, image_size)
    path = _cache("images") / f"{key}.npy"
    if not path.exists():
        temporary = path.with_name(f"{key}.{os.getpid()}.tmp")
        array = _decode(split.select_columns(column), column, image_size, where)
        with temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        os.replace(temporary, path)  # another process sees the whole file or none
    return torch.from_numpy(np.load(path, allow_pickle=False))


def _key(split: Any, *options: Any) -> str:
    words = " ".join(map(str, (split._fingerprint, *options)))
    return hashlib.sha256(words.encode()).hexdigest()[:32]


def _decode(split: Any, column: str, image_size: int | None, where: str) -> NDArray[np.uint8]:
    arrays: list[NDArray[np.uint8]] = []
    for index in range(len(split)):
        try:
            image = split[index][column]
            image = image if image.mode == "L" else image.convert("RGB")
        except (*UNREADABLE, AttributeError) as error:  # None has no mode
            raise DataError(f"Cannot decode image {index} of {where}: {error}") from error
        if image_size is not None:
            image = image.resize((image_size, image_size))
        array = np.asarray(image, dtype=np.uint8)
        expected = arrays[0].shape[:2] if arrays else (array.shape[0],) * 2
        if array.shape[:2] != expected:
            raise DataError(
                f"Image {index} of {where} is {array.shape[0]} x {array.shape[1]} pixels, not "
                f"{expected[0]} x {expected[1]}: give one size for all with --image-size."
            )
        arrays.append(array)
    if not arrays:
        raise DataError(f"{where} has no images.")
    if len({array.ndim for array in arrays}) == 2:  # grey images among colour images
        arrays = [np.stack([a] * 3, axis=-1) if a.ndim == 2 else a for a in arrays]
    stacked = np.stack(arrays)
    channels_first = stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(channels_first)


def _cache(part: str) -> Path:
    root = os.environ.get("GRADMASK_CACHE") or Path.home() / ".cache" / "gradmask"
    folder = Path(root) / part
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _with_test_split(images: Images, labels: Tensor, class_names: tuple[str, ...]) -> Source:
    count = len(labels)
    test, train = stratified(labels, torch.arange(count), round(TEST_SHARE * count))
    return Source(images[train], labels[train], images[test], labels[test], class_names)
