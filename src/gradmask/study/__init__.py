"""Comparisons of training with and without a mask: arms, seeds, controls; any training code."""

from gradmask.study.comparison import StudyOptions, compare
from gradmask.study.trial import Diverged, Trial

__all__ = ["Diverged", "StudyOptions", "Trial", "compare"]
