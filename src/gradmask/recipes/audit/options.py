"""Options of `gradmask audit` and `gradmask audit clean`, which need no PyTorch to be read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gradmask.errors import OptionError, check_choice
from gradmask.study.options import check_counts
from gradmask.study.spec import Spec


@dataclass(frozen=True)
class DynamicsAudit:
    """Options of `gradmask audit`.

    Attributes:
        folder: Output folder of `gradmask run`.
        arm: Kind of mask of the runs.
        seeds: Seeds to audit (default: all that the folder has).
        false_alarms: Share of the flagged samples whose label may be right, where labels were
            planted (`gradmask run --plant 0.05`).
        share: Share of the samples to flag in place of that.
        top: Samples on the page.
    """

    folder: Path
    arm: str = "none"
    seeds: tuple[int, ...] | None = None
    false_alarms: float = 0.1  # as `gradmask.audit.rank` has it
    share: float | None = None
    top: int = 200

    def __post_init__(self) -> None:
        """Check what can be checked without the folder.

        Raises:
            OptionError: If an option's value cannot work.
        """
        if not 0 < self.false_alarms < 1:
            raise OptionError(f"false_alarms={self.false_alarms!r} must be between 0 and 1.")
        if self.share is not None and not 0 <= self.share < 1:
            raise OptionError(f"share={self.share!r} must be at least 0 and below 1.")
        check_counts(self, "top")


@dataclass(frozen=True)
class Audit:
    """Options of `gradmask audit`.

    Attributes:
        folder: Output folder of `gradmask run ... --save-every N`.
        arm: Kind of mask of the runs.
        seeds: Seeds to audit (default: all that the folder has).
        epochs: Epochs to score at (default: all whose weights were kept).
        fisher: Labels of the Fisher information: `empirical`, `sampled` or `exact`.
        probe: Training samples on which influence is measured, by class.
        score: The score that ranks the samples.
        top: Samples on the contact sheet.
        device: `auto`, `cpu`, `cuda`, ...
        threads: CPU threads (default: PyTorch's choice).
    """

    folder: Path
    arm: str = "none"
    seeds: tuple[int, ...] | None = None
    epochs: tuple[int, ...] | None = None
    fisher: Literal["empirical", "sampled", "exact"] = "empirical"
    probe: int = 200
    score: str = "loss"
    top: int = 100
    device: str = "auto"
    threads: int | None = None

    @property
    def place(self) -> Path:
        """Where its files are written: each arm has a folder of its own."""
        from gradmask.study.folder import run_directory

        name = run_directory(self.folder, Spec(self.arm, 0)).name.removesuffix("-seed0")
        return self.folder / "audit" / f"{name}-influence"

    def __post_init__(self) -> None:
        """Check what can be checked without the folder.

        Raises:
            OptionError: If an option's value cannot work.
        """
        check_choice("fisher", self.fisher, ("empirical", "sampled", "exact"))
        check_counts(self, "probe", "top", "threads")
        from gradmask.recipes.audit.scores import AUDIT_SCORES  # needs PyTorch

        check_choice("score", self.score, [form.name for form in AUDIT_SCORES])


@dataclass(frozen=True)
class Clean:
    """Options of `gradmask audit clean`.

    Attributes:
        folder: Output folder of `gradmask run`, whose runs without a mask are audited.
        share: Share of the samples to drop or relabel (default: as many as the planted labels let
            estimate to be wrong).
        seeds: Seeds of the runs (default: all that the folder has).
        jobs: Runs at a time.
        threads: CPU threads of each (default: an equal share of the cores).
        output: Where the new runs are kept (default: `clean` in the folder).
    """

    folder: Path
    share: float | None = None
    seeds: tuple[int, ...] | None = None
    jobs: int = 1
    threads: int | None = None
    output: Path | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without the folder.

        Raises:
            OptionError: If an option's value cannot work.
        """
        check_counts(self, "jobs", "threads")
