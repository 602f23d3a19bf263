"""Mask the gradients of parameters with low Fisher information."""

# ruff: noqa: E402
from gradmask.interrupts import end_at_once

end_at_once()  # PyTorch takes seconds to import; does nothing but on the command line

from gradmask.fisher import Moments, fisher_diagonal, gradient_moments, register_rule
from gradmask.influence import gradient_norms, influence
from gradmask.mask import FisherMask
from gradmask.mask_files import load_masks, masks_from_indices, masks_to_indices, save_masks
from gradmask.monitor import InfluenceMonitor
from gradmask.scores import SCORES, register_score
from gradmask.scoring import parameter_scores
from gradmask.selection import global_threshold, make_masks
from gradmask.unlearning import dampen

__version__ = "0.1.0"

__all__ = [
    "SCORES",
    "FisherMask",
    "InfluenceMonitor",
    "Moments",
    "__version__",
    "dampen",
    "fisher_diagonal",
    "global_threshold",
    "gradient_moments",
    "gradient_norms",
    "influence",
    "load_masks",
    "make_masks",
    "masks_from_indices",
    "masks_to_indices",
    "parameter_scores",
    "register_rule",
    "register_score",
    "save_masks",
]
