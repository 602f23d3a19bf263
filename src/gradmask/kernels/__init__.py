"""Kernels for what PyTorch has no operation for; each has a slower equivalent in PyTorch."""

from gradmask.kernels.clip import clip_where
from gradmask.kernels.digits import count_digits
from gradmask.kernels.gate import Places
from gradmask.kernels.products import (
    add_squared_products,
    can_add_squared_products,
    weigh_squared_products,
)
from gradmask.kernels.select import keep_where

__all__ = [
    "Places",
    "add_squared_products",
    "can_add_squared_products",
    "clip_where",
    "count_digits",
    "keep_where",
    "weigh_squared_products",
]
