"""C sources, compiled once for this machine and loaded; without a compiler PyTorch does the work.

The compiled library is kept in `~/.cache/gradmask/kernels` (or below `GRADMASK_CACHE`) under a
hash of its source, the compiler and the processor. `GRADMASK_KERNELS=0` switches all of it off.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from torch import Tensor

logger = logging.getLogger("gradmask")

_SECONDS = 60  # a compiler that takes longer hangs


@cache
def load(source: str, **macros: str) -> ctypes.CDLL | None:
    """Compile a C source of this package, unless that is done already, and load it.

    Args:
        source: File name beside this module.
        macros: Preprocessor macros.

    Returns:
        The library; None if it is switched off, or cannot be built or loaded here.
    """
    if os.environ.get("GRADMASK_KERNELS") == "0":
        return None
    try:
        compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "cc")), None)
        if compiler is None:
            raise OSError("no C compiler was found")
        return ctypes.CDLL(str(_build(compiler, Path(__file__).with_name(source), macros)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        logger.info("%s is not used, PyTorch does its work, slower: %s", source, reason.strip())
        return None


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Where a tensor's first element lies."""
    return ctypes.c_void_p(tensor.data_ptr())


def _build(compiler: str, source: Path, macros: dict[str, str]) -> Path:
    command = [compiler, "-O3", "-march=native", "-fopenmp", "-fPIC", "-c"]
    command += [f"-D{name}={value}" for name, value in sorted(macros.items())]
    version = _output([compiler, "--version"])
    key = "\0".join([source.read_text(encoding="utf-8"), *command, version, _processor()])
    folder = _folder()
    library = folder / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            compiled, linked = (str(Path(temporary) / name) for name in ("built.o", "built.so"))
            _output([*command, str(source), "-o", compiled])
            # Not linked with OpenMP: its functions are those of the library that PyTorch has
            # loaded, since two pools of threads would compete.
            _output([compiler, "-shared", compiled, "-o", linked])
            os.replace(linked, library)  # another process may have been as quick
    return library


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
    return done.stdout


def _processor() -> str:
    """What `-march=native` depends on: a home directory may be shared by unlike machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    kind = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join([platform.platform(), platform.processor(), *kind[:2]])


def _folder() -> Path:
    root = os.environ.get("GRADMASK_CACHE")
    folder = (Path(root) if root else Path.home() / ".cache" / "gradmask") / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # no home directory, or a read-only one
        pass
    return _private_folder()


@cache
def _private_folder() -> Path:
    """A folder of this process alone: one that others may write to could hold anything."""
    return Path(tempfile.mkdtemp(prefix="gradmask-"))
