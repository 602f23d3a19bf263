"""Dynamics in a file beside a checkpoint's weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gradmask.errors import StateError

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
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items() if isinstance(v, Tensor)}
    plain = {name: value for name, value in state.items() if name not in tensors}
    header = {"format": FORMAT, "state": json.dumps(plain), "about": json.dumps(dict(about))}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _safetensors().torch.save_file(tensors, temporary, header)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
    library = _safetensors()
    try:
        with library.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise StateError(f"{path} holds no dynamics: it is another safetensors file.")
            state = json.loads(header["state"])
            state |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads(header["about"])
    except (OSError, library.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as e:
        if isinstance(e, StateError):
            raise
        words = " ".join(str(e).split())[:200]
        raise StateError(f"{path} cannot be read as a file of dynamics ({words}).") from e
    return state, about


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("Files of dynamics need safetensors: pip install safetensors") from error
    return safetensors
