"""Dynamics in a file beside a checkpoint's weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gradmask.errors import StateError
from gradmask.tensor_files import open_tensors, save_tensors

FORMAT = "gradmask.dynamics"


def save_state(path: Path, state: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write a state of `Dynamics` to a safetensors file; a reader finds the old file or the new.

    Args:
        path: The file; its folder must exist.
        state: What `Dynamics.state_dict` returned.
        about: Plain values to be read with it.

    Raises:
        ImportError: If safetensors is not installed.
    """
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in state.items() if name not in tensors}
    header = {"format": FORMAT, "state": json.dumps(plain), "about": json.dumps(dict(about))}
    save_tensors(path, tensors, header, "dynamics")


def load_state(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what `save_state` wrote.

    Args:
        path: The file.

    Returns:
        The state, on the CPU, and the plain values.

    Raises:
        StateError: If the file is damaged, or another one.
        ImportError: If safetensors is not installed.
    """
    with open_tensors(path, "dynamics") as (file, header):
        if header.get("format") != FORMAT:
            raise StateError(f"{path} holds no dynamics: it is another safetensors file.")
        state = json.loads(header["state"])
        state |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return state, json.loads(header["about"])
