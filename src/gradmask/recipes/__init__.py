"""Controlled comparisons of training with and without the gradient mask."""
