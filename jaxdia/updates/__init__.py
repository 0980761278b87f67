"""Updates from elsewhere: files and frameworks in, params and gradients of a model out."""

from jaxdia.updates.files import read
from jaxdia.updates.gradients import Update, from_difference, from_gradient, from_weights
from jaxdia.updates.matching import Fit, fit

__all__ = [
  "Fit",
  "Update",
  "fit",
  "from_difference",
  "from_gradient",
  "from_weights",
  "read",
]
