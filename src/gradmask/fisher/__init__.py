"""The diagonal of the Fisher information: rules per layer, capture, reference, public function."""

from gradmask.fisher import convolution as convolution  # registers its rules
from gradmask.fisher import linear as linear
from gradmask.fisher.diagonal import Moments, fisher_diagonal, gradient_moments
from gradmask.fisher.rules import register_rule

__all__ = ["Moments", "fisher_diagonal", "gradient_moments", "register_rule"]
