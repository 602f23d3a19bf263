"""The Fisher diagonal out of the training's own backward passes, for the price of the squares."""

from gradmask.collect.collector import Collector

__all__ = ["Collector"]
