"""The measurements of one run, written as it goes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from gradmask.errors import StateError
from gradmask.study.files import damaged, to_json

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
        self._board = _Board(directory)
        for line in written.decode().splitlines():
            self._show(json.loads(line))

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        finally:
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
        self._board.add({n: v for n, v in row.items() if isinstance(v, float)}, when)


class _Board:
    """Events for TensorBoard. Its own writer has a thread, which prints that a disk is full."""

    def __init__(self, directory: Path) -> None:
        name = f"events.out.tfevents.{time.time():.0f}.{os.getpid()}"
        self._file = (directory / name).open("wb")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))

    def add(self, values: dict[str, float], step: int) -> None:
        """Write numbers by name."""
        numbers = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=numbers)))
        self._file.flush()

    def close(self) -> None:
        """Close the file, even if it cannot be written to its end."""
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
