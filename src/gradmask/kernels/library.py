"""C sources, compiled once for this machine and loaded; without a compiler PyTorch does the work.

The compiled library is kept in `~/.cache/gradmask/kernels` (or below `GRADMASK_CACHE`) under a
hash of its source, the compiler and the processor. `GRADMASK_KERNELS=0` switches all of it off.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from gradmask.kernels.cache import find, find_folder, is_safe, store, sweep
from gradmask.kernels.compiler import find_compiler, machine, run

logger = logging.getLogger("gradmask")

_BUILD = "gradmask-build-"
_told: set[str] = set()


@cache
def load(source: str, **macros: str) -> ctypes.CDLL | None:
    """Load a C source of this package, compiled now or earlier.

    Args:
        source: File name beside this module.
        macros: Preprocessor macros.

    Returns:
        The library; None if it is switched off, or cannot be built or loaded here.
    """
    if os.environ.get("GRADMASK_KERNELS") == "0":
        return None
    try:
        return _load(find_compiler(), Path(__file__).with_name(source), macros)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        # One broken compiler fails at every source: that is told once.
        level = logging.DEBUG if _told else logging.INFO
        _told.add(source)
        message = "%s is not used, PyTorch does its work, slower: %s"
        logger.log(level, message, source, reason.strip())
        return None


def _load(compiler: str, source: Path, macros: dict[str, str]) -> ctypes.CDLL:
    command = [compiler, "-O3", "-march=native", "-fopenmp", "-fPIC", "-c"]
    command += [f"-D{name}={value}" for name, value in sorted(macros.items())]
    key = "\0".join([source.read_text(encoding="utf-8"), *command, machine(compiler)])
    name = f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    folder = find_folder()
    library = find(folder, name) if folder else None
    if library is not None:
        return ctypes.CDLL(str(library))
    sweep(Path(tempfile.gettempdir()), _BUILD)
    with tempfile.TemporaryDirectory(prefix=_BUILD, ignore_cleanup_errors=True) as temporary:
        place = Path(temporary).resolve()
        if not is_safe(place):
            raise OSError(f"others can change {place.parent}: point TMPDIR to a folder of your own")
        compiled, linked = place / "built.o", place / "built.so"
        run([*command, str(source), "-o", str(compiled)], folder)
        # Not linked with OpenMP: its functions are those of the library that PyTorch has
        # loaded, since two pools of threads would compete.
        run([compiler, "-shared", str(compiled), "-o", str(linked)], folder)
        stored = store(folder, name, linked.read_bytes()) if folder else None
        return ctypes.CDLL(str(stored or linked))  # stays loaded without its file
