"""Weights of a network on disk: written whole or not at all, read without pickle."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import torch
from torch import nn

from gradmask.errors import StateError

_NAME = "epoch-{:04d}.pt"


def weights_path(directory: Path, epoch: int) -> Path:
    """Where the weights after an epoch lie in the folder of a run."""
    return directory / "weights" / _NAME.format(epoch)


def saved_epochs(directory: Path) -> list[int]:
    """Epochs after which the weights of a run were saved, in order."""
    names = (path.stem for path in (directory / "weights").glob("epoch-*.pt"))
    return sorted(int(name.removeprefix("epoch-")) for name in names)


def save_weights(path: Path, model: nn.Module) -> None:
    """Write parameters and buffers atomically.

    Args:
        path: Where to write; its folder is made.
        model: The network; on any device.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        torch.save({name: t.cpu() for name, t in model.state_dict().items()}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_weights(path: Path, model: nn.Module) -> None:
    """Read parameters and buffers into a network of the same form.

    Args:
        path: A file that `save_weights` wrote.
        model: The network; unchanged if the file does not fit it.

    Raises:
        StateError: If there is no such file, it is damaged, or of another network.
    """
    if not path.is_file():
        raise StateError(f"No weights at {path}: train with --save-every to keep them.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise StateError(f"{path} is damaged: delete the run's folder and train again.") from error
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    differing = sorted(k for k in expected | found if expected.get(k) != found.get(k))
    if differing:
        name = differing[0]
        raise StateError(
            f"{path} is of another network: {name!r} has shape {found.get(name, 'none')}, "
            f"expected {expected.get(name, 'none')} (of {len(differing)} that differ)."
        )
    model.load_state_dict(state)
