"""Folders of images by class, as data sets with a column of files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension, make_dataset

from gradmask.errors import DataError

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_MEND = "Every image must lie in the folder of its class, as train/CLASS/NAME or CLASS/NAME"


def image_folder(path: Path) -> dict[str, Any]:
    """List the images of a folder; none is opened.

    Torchvision lists them: `datasets` takes 20 minutes for the files of ImageNet, at every start.

    Args:
        path: Holds `train/CLASS/NAME`, perhaps `val` and `test` as well, or `CLASS/NAME`.

    Returns:
        Data sets by split (`train`, `validation`, `test`) with the columns `image` and `label`.
        Test images that lie in no classes have no labels, and are left out.

    Raises:
        DataError: If an image lies outside the folders of classes, or there are no two classes, or
            a split has none or others than those of the training images.
    """
    found = {
        split: next((path / name for name in names if (path / name).is_dir()), None)
        for split, names in _SPLITS.items()
    }
    folders = {split: folder for split, folder in found.items() if folder is not None}
    if not folders:
        folders = {"train": path}
    if "train" not in folders:
        raise DataError(f"{path} has no folder train, only: {', '.join(folders)}.")
    if "test" in folders and not _classes(folders["test"]):
        del folders["test"]
    names = _classes(folders["train"])
    if len(names) < 2:
        raise DataError(
            f"{folders['train']} has no label for its images: it holds "
            f"{len(names) or 'no'} folder{'s' * (len(names) != 1)} of classes. {_MEND}, of two "
            "classes at least."
        )
    return {split: _rows(folder, names) for split, folder in folders.items()}


def _classes(folder: Path) -> list[str]:
    folders = (entry for entry in os.scandir(folder) if entry.is_dir())
    return sorted(entry.name for entry in folders if not entry.name.startswith("."))


def _rows(folder: Path, names: list[str]) -> Any:
    import datasets
    import pyarrow

    stray = next(
        (e.path for e in os.scandir(folder) if has_file_allowed_extension(e.name, IMG_EXTENSIONS)),
        None,
    )
    if stray is not None:
        raise DataError(f"{stray} has no label. {_MEND}.")
    if unknown := set(_classes(folder)) - set(names):
        raise DataError(f"{folder} has a class that is not in train: {min(unknown)}.")
    numbers = {name: number for number, name in enumerate(names)}
    files = make_dataset(folder, numbers, IMG_EXTENSIONS, allow_empty=True)
    if not files:
        raise DataError(f"{folder} has no images ({', '.join(IMG_EXTENSIONS)}).")
    paths = [path for path, _ in files]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    undecoded = pyarrow.StructArray.from_arrays(
        [pyarrow.nulls(len(paths), pyarrow.binary()), pyarrow.array(paths)], ["bytes", "path"]
    )
    columns = {"image": undecoded, "label": [label for _, label in files]}
    table = pyarrow.table(columns, schema=features.arrow_schema)
    info = datasets.DatasetInfo(features=features)
    return datasets.Dataset(table, info=info, fingerprint=_fingerprint(paths))


def _fingerprint(paths: list[str]) -> str:
    """Changes with the files, so that what was decoded from them is not taken for them."""
    digest = hashlib.sha256()
    for path in paths:
        found = os.stat(path)
        digest.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
