"""Mask the gradients of parameters with low Fisher information."""

# ruff: noqa: E402
from gradmask.interrupts import end_at_once

end_at_once()  # PyTorch takes seconds to import; does nothing but on the command line

from gradmask.fisher import fisher_diagonal, register_rule
from gradmask.influence import gradient_norms, influence
from gradmask.mask import FisherMask
from gradmask.monitor import InfluenceMonitor
from gradmask.selection import global_threshold, make_masks

__version__ = "0.1.0"

__all__ = [
    "FisherMask",
    "InfluenceMonitor",
    "__version__",
    "fisher_diagonal",
    "global_threshold",
    "gradient_norms",
    "influence",
    "make_masks",
    "register_rule",
]
