"""Where the checkpoints of Hugging Face's `Trainer` lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def checkpoint_folder(args: Any, state: Any) -> Path:
    """The folder of the checkpoint of this step.

    Args:
        args: The Trainer's arguments.
        state: Its state.
    """
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def places_of(file: str, args: Any, state: Any, resume: str | Path | None) -> list[Path]:
    """Where a file may lie that a callback has written beside the weights to go on from.

    Args:
        file: Its name.
        args: The Trainer's arguments.
        state: Its state.
        resume: The checkpoint's folder, as the user told the callback.
    """
    if resume:
        return [Path(resume) / file]
    given = args.resume_from_checkpoint
    folders = [Path(given)] if isinstance(given, str | Path) else []
    return [folder / file for folder in (*folders, checkpoint_folder(args, state))]
