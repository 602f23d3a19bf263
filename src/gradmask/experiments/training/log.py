"""The measurements of one run, written as it goes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from gradmask.errors import StateError
from gradmask.experiments.files import damaged, to_json

Position = tuple[int, str]  # bytes written, and their BLAKE2b sum
START: Position = (0, "")


class RunLog:
    """`metrics.jsonl` and TensorBoard events of one run.

    Args:
        directory: The run's folder.
        position: How much of `metrics.jsonl` to go on from; what follows is written again.

    Raises:
        StateError: If `metrics.jsonl` is shorter than that, or not what was written.
    """

    def __init__(self, directory: Path, position: Position = START) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        size, expected = position
        mend = f"delete the folder {directory} to train this run anew, or choose another --output."
        written = path.read_bytes()[:size] if size and path.exists() else b""
        if len(written) < size:
            raise StateError(f"{path} is shorter than the run's checkpoint says: {mend}")
        self._sum = hashlib.blake2b(written, digest_size=16)
        if expected not in ("", self._sum.hexdigest()):
            raise damaged(path, "it is not what the run's checkpoint says", mend)
        self._file = path.open("ab")
        self._file.truncate(size)
        for stale in directory.glob("events.out.tfevents.*"):  # of a run that was interrupted
            stale.unlink()
        self._board = SummaryWriter(str(directory))
        for line in written.decode().splitlines():
            self._show(json.loads(line))

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()

    def write(self, row: dict[str, Any]) -> None:
        """Write the measurements of an epoch, or a record of an influence monitor.

        TensorBoard counts the first in epochs, the second in optimizer steps.
        """
        line = f"{to_json(row)}\n".encode()
        self._sum.update(line)
        self._file.write(line)
        self._file.flush()
        self._show(row)

    def position(self) -> Position:
        """How much of `metrics.jsonl` there is, which is then on the disk."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size, self._sum.hexdigest()

    def _show(self, row: dict[str, Any]) -> None:
        when = int(row["step"] if "step" in row else row["epoch"])
        for name, value in row.items():
            if isinstance(value, float):
                self._board.add_scalar(name, value, when)
