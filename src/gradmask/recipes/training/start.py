"""Weights to start from, of a file that another training wrote; no pickle is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gradmask.errors import StateError, first_names
from gradmask.recipes.data.folders import warn_once
from gradmask.recipes.identity import tensors_sum
from gradmask.recipes.training.weights import check_shapes, shapes
from gradmask.study.files import damaged

_INSIDE = ("state_dict", "model_state_dict", "model")  # where checkpoints have them
_MEND = "give weights of this network, in safetensors or as torch.save writes a state_dict."


def weights_sum(name: str) -> str:
    """The sum of the weights in a file, by which they are known again."""
    return tensors_sum(read_start(Path(name).expanduser()))


def start_from(path: Path, model: nn.Module, classes: int) -> None:
    """Fill a network with weights from a file.

    What has an entry for each class and another shape in the file, or is missing there, keeps its
    start: a warning names it.

    Args:
        path: safetensors, or what `torch.save` wrote of a `state_dict`, perhaps in a dict under
            `state_dict`, `model_state_dict` or `model`.
        model: The network.
        classes: Number of classes.

    Raises:
        StateError: If the file cannot be read, or is of another network.
    """
    found, own = read_start(path), model.state_dict()
    left_out = {
        name
        for name, tensor in own.items()
        if tensor.dim() and len(tensor) == classes
        if name not in found or found[name].shape != tensor.shape
    }
    # Counts of batches, which files from before PyTorch 0.4.1 lack, begin at 0.
    counts = {name for name in own if name.endswith("num_batches_tracked") and name not in found}
    filled = {k: v for k, v in found.items() if k not in left_out}
    filled |= {name: own[name] for name in left_out | counts}
    check_shapes(path, shapes(filled), model, _MEND)
    if left_out:
        if left_out == own.keys() - counts:
            raise StateError(f"{path} fits no tensor of the network: {_MEND}")
        warn_once(
            f"{path} has other classes than the {classes} of the data: {first_names(left_out)} "
            "keep their random start."
        )
    model.load_state_dict(filled)


def read_start(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file by name.

    Args:
        path: The file.

    Raises:
        StateError: If it is not there, or no such file.
    """
    if not path.is_file():
        raise StateError(f"weights={str(path)!r} is no file: {_MEND}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        found = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:  # spoilt bytes lead torch to raise anything
        raise damaged(path, str(error).splitlines()[0], _MEND) from error
    for name in _INSIDE:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise damaged(path, "it holds no weights", _MEND)
    prefix = "module."  # of DistributedDataParallel
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}
