"""Kernels for what PyTorch has no operation for; each has a slower equivalent in PyTorch."""

from gradmask.kernels.products import add_squared_products, can_add_squared_products

__all__ = ["add_squared_products", "can_add_squared_products"]
