"""What results were measured with: versions, machine, threads."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import gradmask

_PACKAGES = ("torchvision", "transformers", "lightning", "accelerate")


def environment(device: str = "auto") -> dict[str, Any]:
    """Versions and machine that results are measured with.

    Args:
        device: What is trained on; `auto` is CUDA where there is any.

    Returns:
        Plain values by name.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    found = {
        "gradmask": gradmask.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found | {
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if cuda else device.replace("auto", "cpu"),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """Commit of the source this runs from, if it is a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run([*git, "--exclude=*"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
