"""Masks in files and lists: packed bits in a safetensors file, or the entries that learn."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradmask.distributed import is_sharded
from gradmask.errors import StateError
from gradmask.mask_state import check_masks
from gradmask.parameters import trainable_parameters
from gradmask.tensor_files import open_tensors, save_tensors

FORMAT, VERSION = "gradmask", "1"
_OTHER = "/"  # no parameter's name begins so


def save_masks(
    path: str | Path,
    masks: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """Write masks to a safetensors file, an eighth of a byte for each entry.

    A reader finds the old file or the new, never a part. Masks in shards are put together, for
    which every rank must call; rank 0 writes.

    Args:
        path: The file; its folder must exist.
        masks: `{parameter name: bool tensor}`, True where it learns.
        metadata: Anything that JSON can hold, to be read by `read_masks`.
        others: Other tensors to be read by `read_state`, as they are.

    Raises:
        StateError: If a mask is no bool tensor.
        ImportError: If safetensors is not installed.
    """
    check_masks(masks)
    sharded = any(is_sharded(tensor) for tensor in [*masks.values(), *(others or {}).values()])
    whole = {name: _whole(mask) for name, mask in masks.items()}
    others = {name: _whole(tensor) for name, tensor in (others or {}).items()}
    if sharded and dist.get_rank() != 0:
        return
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "shapes": json.dumps(shapes),
        "metadata": json.dumps(dict(metadata or {})),
        "sha256": masks_sha256(whole, metadata, others),
    }
    stored = {name: _pack(mask) for name, mask in whole.items()}
    stored |= {_OTHER + name: tensor for name, tensor in others.items()}
    save_tensors(Path(path), stored, header, "masks")


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """Read the masks of a file that `save_masks` or `FisherMask.save` wrote.

    Args:
        path: The file.

    Returns:
        `{parameter name: bool tensor}`, on the CPU.

    Raises:
        StateError: If the file is missing, damaged, or another one.
        ImportError: If safetensors is not installed.
    """
    return read_masks(path)[0]


def read_masks(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The masks of a file, as `load_masks` reads them, and the metadata saved with them."""
    masks, metadata, _ = read_state(path)
    return masks, metadata


def read_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """The same, and the other tensors."""
    with open_tensors(path, "masks") as (file, header):
        if header.get("format") != FORMAT or "shapes" not in header:
            raise StateError(f"{path} holds no masks: it is another safetensors file.")
        if header.get("version") != VERSION:
            raise StateError(
                f"{path} is of version {header.get('version')}, this gradmask reads {VERSION}: "
                "use the gradmask that wrote it, or a newer one."
            )
        shapes, metadata = json.loads(header["shapes"]), json.loads(header["metadata"])
        masks = {n: _unpack(file.get_tensor(n), shape) for n, shape in shapes.items()}
        names = [name for name in file.keys() if name.startswith(_OTHER)]  # noqa: SIM118
        others = {name.removeprefix(_OTHER): file.get_tensor(name) for name in names}
    if masks_sha256(masks, metadata, others) != header.get("sha256"):
        raise StateError(f"{path} is damaged: its masks are not those whose SHA-256 it holds.")
    return masks, metadata, others


def masks_sha256(
    masks: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
    others: Mapping[str, Tensor] | None = None,
) -> str:
    """SHA-256 of masks and metadata, whatever the order and the devices.

    Args:
        masks: `{parameter name: bool tensor}`; of masks in shards every rank must call.
        metadata: Anything that JSON can hold.
        others: Other tensors.

    Returns:
        Hexadecimal digits.
    """
    found = hashlib.sha256(json.dumps(dict(metadata or {}), sort_keys=True).encode())

    def add(label: list[Any], data: Tensor) -> None:
        found.update(json.dumps(label).encode())
        for chunk in data.split(1 << 20):
            found.update(bytes(chunk.tolist()))

    for name in sorted(masks):
        bits = _pack(_whole(masks[name]))
        add([name, list(masks[name].shape)], bits)
    for name in sorted(others or {}):
        tensor = _whole((others or {})[name]).detach().cpu().contiguous()
        label = [name, str(tensor.dtype), list(tensor.shape)]
        add(label, tensor.flatten().view(torch.uint8))
    return found.hexdigest()


def masks_to_indices(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries that learn, as lists of places.

    Args:
        masks: `{parameter name: bool tensor}`; of masks in shards every rank must call.

    Returns:
        `{parameter name: int64 places in the flattened tensor}`, in rising order, on the CPU.
    """
    check_masks(masks)
    return {name: _whole(mask).cpu().flatten().nonzero()[:, 0] for name, mask in masks.items()}


def masks_from_indices(
    model: nn.Module, indices: Mapping[str, Tensor | Iterable[int]]
) -> dict[str, Tensor]:
    """Masks of a model's trainable parameters from the entries that learn.

    Args:
        model: The model.
        indices: `{parameter name: places in the flattened tensor}`, as `masks_to_indices` gives
            them. Nothing learns of a parameter that is not named.

    Returns:
        `{parameter name: bool tensor}` for all trainable parameters, on the CPU.

    Raises:
        StateError: If a name is not that of a trainable parameter, or a place is outside it.
    """
    parameters = trainable_parameters(model)
    if odd := sorted(str(name) for name in indices.keys() - parameters.keys()):
        raise StateError(f"The model has no trainable parameters {', '.join(odd[:5])}.")
    masks = {}
    for name, parameter in parameters.items():
        shape = parameter.shape
        masks[name] = mask = torch.zeros(math.prod(shape), dtype=torch.bool, device="cpu")
        places = indices.get(name, ())
        places = torch.as_tensor(
            places if isinstance(places, Tensor) else list(places), device="cpu"
        )
        if places.numel():
            integers = not places.is_floating_point() and places.dtype != torch.bool
            if places.dim() != 1 or not integers or places.min() < 0 or places.max() >= len(mask):
                raise StateError(
                    f"The indices of {name!r} must be a list of whole numbers from 0 to "
                    f"{len(mask) - 1}, places in the flattened tensor."
                )
            mask[places.long()] = True
        masks[name] = mask.view(shape)
    return masks


def _whole(mask: Tensor) -> Tensor:
    whole: Tensor = mask.full_tensor() if is_sharded(mask) else mask  # type: ignore[attr-defined]
    return whole


def _pack(mask: Tensor) -> Tensor:
    """Eight entries in a byte, the first in its lowest bit; on the CPU."""
    bits = mask.detach().flatten().to(torch.uint8)
    columns = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    packed = torch.zeros(len(columns), dtype=torch.uint8, device=bits.device)
    for place in range(8):
        packed |= columns[:, place] << place
    return packed.cpu()


def _unpack(packed: Tensor, shape: list[int]) -> Tensor:
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (math.ceil(count / 8),):
        raise ValueError("the bits do not fit the shapes")
    columns = [(packed >> place & 1).bool() for place in range(8)]
    return torch.stack(columns, 1).flatten()[:count].view(shape)
