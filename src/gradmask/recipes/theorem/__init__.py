"""Theorem 1 checked: exact divergence against its quadratic and diagonal forms."""
