"""Folders of images by class, as data sets with a column of files."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS

from gradmask.errors import DataError, GradmaskWarning

SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
EXTENSIONS = (*IMG_EXTENSIONS, ".gif")
_MEND = "Every image must lie in the folder of its class, as train/CLASS/NAME or CLASS/NAME"


def image_folder(path: Path) -> dict[str, Any]:
    """List the images of a folder; none is opened.

    `datasets` itself takes 20 minutes for the files of ImageNet, at every start.

    What is no image, is hidden, cannot be read as a file, or links back into the folder is left
    out, and so are classes without images; one warning says so.

    Args:
        path: Holds `train/CLASS/NAME`, perhaps `val` and `test` as well, or `CLASS/NAME`. Splits
            may be written in any capitals.

    Returns:
        Data sets by split (`train`, `validation`, `test`) with the columns `image` and `label`.
        Test images that lie in no classes have no labels, and are left out.

    Raises:
        DataError: If an image lies outside the folders of classes, or there are no two classes, or
            a split has none or others than those of the training images, or is there twice.
    """
    folders = _splits(path)
    if "train" not in folders:
        raise DataError(f"{path} has no folder train, only: {', '.join(folders)}.")
    lister = _Lister([os.path.realpath(folder) for folder in folders.values()])
    found = {split: lister.classes(folder, split) for split, folder in folders.items()}
    if "test" in found and not found["test"]:
        del found["test"]
    names = list(found["train"])
    lister.warn(path)
    if len(names) < 2:
        raise DataError(
            f"{folders['train']} has no label for its images: it holds {len(names) or 'no'} "
            f"folder{'s' * (len(names) != 1)} of classes with images "
            f"({', '.join(EXTENSIONS)}). {_MEND}, of two classes at least."
        )
    for split, classes in found.items():
        if not classes and split != "train":
            raise DataError(f"{folders[split]} has no images in folders of classes. {_MEND}.")
        if unknown := set(classes) - set(names):
            raise DataError(
                f"{folders[split]} has a class that is not in train: {min(unknown)}. Remove it, "
                "or add images of it to train."
            )
    return {split: rows_of(classes, names) for split, classes in found.items()}


def _splits(path: Path) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for entry in _scan(path):
        for split, names in SPLITS.items():
            if entry.name.lower() in names and os.path.isdir(entry.path):
                if split in folders:
                    raise DataError(
                        f"{path} holds two folders of {split} images, {folders[split].name} and "
                        f"{entry.name}: merge them, or move one away."
                    )
                folders[split] = path / entry.name
    return folders or {"train": path}


def _scan(folder: Path | str) -> list[os.DirEntry[str]]:
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"Cannot list {folder}: {error.strerror}. Make it readable.") from error


@dataclass
class _Lister:
    """Lists images, and remembers what it leaves out.

    Attributes:
        roots: Real paths of the splits' folders, into which no link may lead back.
        left_out: Paths by the reason why.
    """

    roots: list[str]
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def classes(self, folder: Path, split: str) -> dict[str, list[str]]:
        """Images by class, in the order of their names; classes without images are left out."""
        found = {}
        files, folders = self._entries(folder, list(self.roots))
        if files and (folders or split != "test"):
            raise DataError(f"{files[0]} has no label. {_MEND}.")
        if files:
            self.left_out["without a label"] += files
        for inner in folders:
            if images := self._images(inner):
                found[os.path.basename(inner)] = images
            else:
                self.left_out["class without images"].append(inner)
        return found

    def _images(self, folder: str) -> list[str]:
        images, waiting, followed = [], [folder], [*self.roots, os.path.realpath(folder)]
        while waiting:
            files, folders = self._entries(waiting.pop(), followed)
            images += files
            waiting += reversed(folders)
        return images

    def _entries(self, folder: Path | str, followed: list[str]) -> tuple[list[str], list[str]]:
        """Images and folders in a folder; the targets of links that are followed are noted."""
        files, folders = [], []
        for entry in _scan(folder):
            link = entry.is_symlink()
            if not is_utf8(entry.name):
                reason = "name that is not UTF-8"
            elif entry.name.startswith("."):
                reason = "hidden"
            elif os.path.isdir(entry.path) if link else entry.is_dir():
                reason = "link into a folder that is listed"
                if not link or _is_new(os.path.realpath(entry.path), followed):
                    folders.append(entry.path)
                    continue
            elif not entry.name.lower().endswith(EXTENSIONS):
                reason = "no image by its name"
            elif os.path.isfile(entry.path) if link else entry.is_file():
                files.append(entry.path)
                continue
            else:
                reason = "no file (a dangling link, pipe or device)"
            self.left_out[reason].append(entry.path)
        return files, folders

    def warn(self, path: Path) -> None:
        """Say in one line what is left out, if anything is."""
        if self.left_out:
            parts = [
                f"{len(paths)} {reason} (first: {os.path.relpath(paths[0], path)!r})"
                for reason, paths in self.left_out.items()
            ]
            warn_once(f"Left out of {path}: {', '.join(parts)}.")


@lru_cache
def warn_once(text: str) -> None:
    """Warn, and not again in the next run of a comparison, which reads the same data."""
    warnings.warn(text, GradmaskWarning, stacklevel=3)


def is_utf8(name: str) -> bool:
    """Whether a name can be written down; those of files are bytes, and may be anything."""
    return name.isascii() or name.encode(errors="ignore").decode() == name


def _is_new(target: str, followed: list[str]) -> bool:
    """Whether a folder neither holds, nor is, nor lies in one that was followed; noted if so."""
    if any(os.path.commonpath((target, other)) in (target, other) for other in followed):
        return False
    followed.append(target)
    return True


def rows_of(classes: dict[str, list[str]], names: list[str]) -> Any:
    """A data set of files by class.

    Args:
        classes: Paths by the name of their class.
        names: Names of all classes, in the order of their labels.

    Returns:
        The data set, with the columns `image` and `label`.
    """
    import datasets
    import pyarrow

    paths = [path for images in classes.values() for path in images]
    labels = [names.index(name) for name, images in classes.items() for _ in images]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    undecoded = pyarrow.StructArray.from_arrays(
        [pyarrow.nulls(len(paths), pyarrow.binary()), pyarrow.array(paths)], ["bytes", "path"]
    )
    table = pyarrow.table({"image": undecoded, "label": labels}, schema=features.arrow_schema)
    info = datasets.DatasetInfo(features=features)
    return datasets.Dataset(table, info=info, fingerprint=_fingerprint(paths))


def _fingerprint(paths: list[str]) -> str:
    """Changes with the files, so that what was decoded from them is not taken for them."""
    digest = hashlib.sha256()
    for path in paths:
        found = os.stat(path)
        digest.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
