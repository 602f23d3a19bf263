"""The measurements of one run, written as it goes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from gradmask.errors import StateError


class RunLog:
    """`metrics.jsonl` and TensorBoard events of one run.

    Args:
        directory: The run's folder.
        position: Bytes of `metrics.jsonl` to go on from; what follows them is written again.

    Raises:
        StateError: If `metrics.jsonl` is shorter than that.
    """

    def __init__(self, directory: Path, position: int = 0) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        if position > (path.stat().st_size if path.exists() else 0):
            raise StateError(
                f"{path} is shorter than the run's checkpoint says: delete the folder {directory} "
                "to train this run anew, or choose another --output."
            )
        self._file = path.open("a", encoding="utf-8")
        self._file.truncate(position)
        for stale in directory.glob("events.out.tfevents.*"):  # of a run that was interrupted
            stale.unlink()
        self._board = SummaryWriter(str(directory))
        for line in path.read_text(encoding="utf-8").splitlines():
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
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._show(row)

    def position(self) -> int:
        """Bytes of `metrics.jsonl` so far, which are then on the disk."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def _show(self, row: dict[str, Any]) -> None:
        when = int(row["step"] if "step" in row else row["epoch"])
        for name, value in row.items():
            if isinstance(value, float):
                self._board.add_scalar(name, value, when)
