"""How much one sample's gradient step changes the predictions on others (equations 3, 4, 9)."""

from gradmask.influence.measure import influence
from gradmask.influence.norms import gradient_norms

__all__ = ["gradient_norms", "influence"]
