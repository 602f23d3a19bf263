"""How much one sample's gradient step changes the predictions on others (equations 3, 4, 9)."""

from gradmask.influence.measure import influence

__all__ = ["influence"]
