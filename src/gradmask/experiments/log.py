"""The measurements of one run, written as it goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """`metrics.jsonl` and TensorBoard events of one run.

    Args:
        directory: The run's folder.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob("events.out.tfevents.*"):  # of a run that was interrupted
            stale.unlink()
        self._file = (directory / "metrics.jsonl").open("w")
        self._board = SummaryWriter(str(directory))

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()

    def write_epoch(self, row: dict[str, Any]) -> None:
        """Write the measurements of an epoch; TensorBoard counts these in epochs."""
        self._write(row, row["epoch"])

    def write_record(self, record: dict[str, float]) -> None:
        """Write a record of an influence monitor; TensorBoard counts these in steps."""
        self._write(record, int(record["step"]))

    def _write(self, row: dict[str, Any], when: int) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if isinstance(value, float):
                self._board.add_scalar(name, value, when)
