"""Mask the gradients of parameters with low Fisher information."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gradmask.interrupts import end_at_once
from gradmask.lazy import lazily

end_at_once()  # PyTorch takes seconds to import; does nothing but on the command line

if TYPE_CHECKING:
    from gradmask.fisher import Moments, fisher_diagonal, gradient_moments, register_rule
    from gradmask.influence import gradient_norms, influence
    from gradmask.mask import FisherMask
    from gradmask.mask_files import load_masks, masks_from_indices, masks_to_indices, save_masks
    from gradmask.monitor import InfluenceMonitor
    from gradmask.scores import SCORES, register_score
    from gradmask.scoring import parameter_scores
    from gradmask.selection import global_threshold, make_masks
    from gradmask.unlearning import dampen
else:  # all of these need PyTorch, which the help of a command does not
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "fisher": ["Moments", "fisher_diagonal", "gradient_moments", "register_rule"],
            "influence": ["gradient_norms"],
            "mask": ["FisherMask"],
            "mask_files": ["load_masks", "masks_from_indices", "masks_to_indices", "save_masks"],
            "monitor": ["InfluenceMonitor"],
            "scores": ["SCORES", "register_score"],
            "scoring": ["parameter_scores"],
            "selection": ["global_threshold", "make_masks"],
            "unlearning": ["dampen"],
        },
    )

    class _Package(ModuleType):
        """Has a function `influence`, though the package inside has that name as well.

        Python sets a package inside as an attribute when it is imported, which would hide the
        function.
        """

        @property
        def influence(self) -> Any:
            from gradmask.influence import influence

            return influence

        @influence.setter
        def influence(self, module: ModuleType) -> None:
            pass

    sys.modules[__name__].__class__ = _Package

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
