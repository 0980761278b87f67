"""Updates from elsewhere: files and frameworks in, params and gradients of a model out."""

from jaxdia.updates.files import read
from jaxdia.updates.matching import Fit, fit

__all__ = [
  "Fit",
  "fit",
  "read",
]
