"""Finds a data set by its name: a folder, or one on the Hugging Face hub. No image is opened."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

from gradmask.errors import DataError
from gradmask.recipes.data.cache import cache_folder
from gradmask.recipes.data.folders import image_folder, is_utf8
from gradmask.recipes.data.labels import labelled_images

SPLITS = ("train", "test", "validation")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_HUB_SECONDS = 10  # for an answer


def open_splits(name: str, labels_csv: str | None = None) -> Any:
    """Find a data set.

    Args:
        name: A folder of parquet files named `train*` and `test*` (or `validation*`), a folder of
            images by class, or a name on the hub, `owner/name`.
        labels_csv: File with the labels of images that lie in the folder in any order.

    Returns:
        Data sets by split.

    Raises:
        DataError: If there is no such folder or data set, or it cannot be read. A name that can be
            no hub name is not looked up there; one that can is asked for once.
    """
    if not is_utf8(name):
        raise DataError(f"The name {name!r} is not UTF-8: rename the folder.")
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        if labels_csv is not None:
            return labelled_images(path, Path(os.path.expanduser(labels_csv)))
        parquet = [p for p in sorted(path.glob("*.parquet")) if not p.name.startswith(".")]
        return _parquet(path, parquet) if parquet else image_folder(path)
    missing = f"No folder at {path}; the nearest there is: {_nearest(path)}."
    if os.path.exists(path):
        missing = f"{path} is a file, and must be a folder."
    if labels_csv is not None or os.path.exists(path) or not _HUB_NAME.fullmatch(name):
        raise DataError(
            f"{missing} Data must be a folder, a name on the Hugging Face hub (owner/name) or "
            "'digits'."
        )
    return _from_hub(name, missing)


def _nearest(path: Path) -> Path:
    """What a missing folder may be misspelt for, or else the last one of its path there is."""
    path = Path(os.path.abspath(path))
    there = next(parent for parent in path.parents if os.path.isdir(parent))
    missing = path.parts[len(there.parts)]
    folders = {entry.lower(): entry for entry in os.listdir(there) if (there / entry).is_dir()}
    close = difflib.get_close_matches(missing.lower(), folders, n=1)
    return there / folders[close[0]] if close else there


def _parquet(path: Path, files: list[Path]) -> Any:
    found = {s: [str(p) for p in files if p.name.lower().startswith(s)] for s in SPLITS}
    if not found["train"]:
        raise DataError(f"{path} holds parquet files, but none is named train*.parquet.")
    splits = {split: paths for split, paths in found.items() if paths}
    cache = str(cache_folder("datasets"))
    return _load(f"Cannot load {path}", path="parquet", data_files=splits, cache_dir=cache)


def _from_hub(name: str, missing: str) -> Any:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    hub = f"{missing} The Hugging Face hub"
    try:
        HfApi().dataset_info(name, timeout=_HUB_SECONDS)
    except RepositoryNotFoundError as error:
        raise DataError(f"{hub} has no data set {name} that you may read.") from error
    except Exception as error:  # of whichever library speaks to the hub
        datasets.config.HF_HUB_OFFLINE = True  # or `datasets` asks six times more
        return _load(f"{hub} cannot be reached ({error}), and no copy can be read", path=name)
    return _load(f"{hub} fails", path=name)


def _load(failed: str, **options: Any) -> Any:
    import datasets  # slow to import, and neither digits nor wrong names need it

    try:
        return datasets.load_dataset(**options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{failed}: {error}") from error
