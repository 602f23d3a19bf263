"""Weights of a network on disk: written whole or not at all, read without pickle."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gradmask.errors import StateError
from gradmask.recipes.identity import tensors_sum
from gradmask.study.files import damaged, read_tensors
from gradmask.tensor_files import atomic_file

_NAME = "epoch-{:04d}.pt"
_TRAIN = "delete the run's folder and train again."
_EPOCH = re.compile(r"epoch-(\d{4,9})\.pt", re.ASCII)


def weights_path(directory: Path, epoch: int) -> Path:
    """Where the weights after an epoch lie in the folder of a run."""
    return directory / "weights" / _NAME.format(epoch)


def saved_epochs(directory: Path) -> list[int]:
    """Epochs after which the weights of a run were saved, in order."""
    names = (_EPOCH.fullmatch(path.name) for path in (directory / "weights").glob("epoch-*.pt"))
    return sorted(int(name[1]) for name in names if name)


def remove_weights(directory: Path) -> None:
    """Remove the weights of an earlier training from the folder of a run."""
    for epoch in saved_epochs(directory):
        weights_path(directory, epoch).unlink(missing_ok=True)


def save_weights(path: Path, state: Mapping[str, Tensor]) -> str:
    """Write parameters and buffers atomically.

    Args:
        path: Where to write; its folder is made.
        state: The network's `state_dict`; on any device.

    Returns:
        Their sum, by which the run knows them again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: t.cpu() for name, t in state.items()}
    with atomic_file(path) as file:
        torch.save(state, file)
    return tensors_sum(state)


def load_weights(
    path: Path, model: nn.Module, expected: str | None = None, mend: str = _TRAIN
) -> str:
    """Read parameters and buffers into a network of the same form.

    Args:
        path: A file that `save_weights` wrote.
        model: The network; unchanged if the file does not fit it.
        expected: Their sum as the run recorded it (default: any).
        mend: What to do if it is damaged, for the message.

    Returns:
        Their sum.

    Raises:
        StateError: If there is no such file, it is damaged, of another network or of another
            training.
    """
    if not path.is_file():
        raise StateError(f"No weights at {path}: train with --save-every to keep them.")
    state = read_tensors(path, mend)
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise damaged(path, "it holds no weights", mend)
    if any(not t.isfinite().all() for t in state.values()):
        raise damaged(path, "weights are not finite", mend)
    check_shapes(path, shapes(state), model, "build the network as it was trained.")
    whole = [n for n, t in model.state_dict().items() if not t.is_floating_point()]
    if any(t.is_floating_point() == (name in whole) for name, t in state.items()):
        raise damaged(path, "whole numbers stand where weights should", mend)
    found = tensors_sum(state)
    if expected not in (None, found):
        raise StateError(
            f"{path} is not of the run in results.json, but of another training (sum {found}, not "
            f"{expected}): delete it, and train again to have that run's."
        )
    model.load_state_dict(state)
    return found


def shapes(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The shape of every tensor by name."""
    return {name: list(tensor.shape) for name, tensor in state.items()}


def check_shapes(path: Path, found: dict[str, list[int]], model: nn.Module, mend: str) -> None:
    """Check that parameters and buffers fit a network.

    Args:
        path: The file they were read from, for the message.
        found: Their shapes by name.
        model: The network.
        mend: What to do if they do not, for the message.

    Raises:
        StateError: If a name or a shape differs.
    """
    expected = shapes(model.state_dict())
    differing = sorted(k for k in expected | found if expected.get(k) != found.get(k))
    if differing:
        name = differing[0]
        raise StateError(
            f"{path} is of another network: {name!r} has shape {_words(found.get(name))}, "
            f"expected {_words(expected.get(name))} (of {len(differing)} that differ): {mend}"
        )


def _words(shape: list[int] | None) -> str:
    return "none" if shape is None else str(tuple(shape))
