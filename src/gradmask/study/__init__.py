"""Comparisons of training with and without a mask: arms, seeds, controls; any training code."""

from typing import TYPE_CHECKING

from gradmask.extras import require
from gradmask.lazy import lazily

require("study", "gradmask.study")

if TYPE_CHECKING:
    from gradmask.study.comparison import compare
    from gradmask.study.config import StudyOptions
    from gradmask.study.trial import Diverged, Trial
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {"comparison": ["compare"], "config": ["StudyOptions"], "trial": ["Diverged", "Trial"]},
    )

__all__ = ["Diverged", "StudyOptions", "Trial", "compare"]
