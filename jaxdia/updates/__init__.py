"""Updates from elsewhere: files and frameworks in, params and gradients of a model out."""

from jaxdia.updates.averages import NewAverages, find_averages, use_averages
from jaxdia.updates.files import read
from jaxdia.updates.flower import from_flower
from jaxdia.updates.gradients import Update, from_difference, from_gradient, from_weights
from jaxdia.updates.matching import Fit, fit
from jaxdia.updates.nvflare import from_nvflare

__all__ = [
  "Fit",
  "NewAverages",
  "Update",
  "find_averages",
  "fit",
  "from_difference",
  "from_flower",
  "from_gradient",
  "from_nvflare",
  "from_weights",
  "read",
  "use_averages",
]
