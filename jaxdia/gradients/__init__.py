"""Distances between gradients, and kernel gradients that are compared without being formed."""

from jaxdia.gradients.distances import (
  DISTANCES,
  Comparison,
  cosine_distance,
  noise_distance,
  squared_l2_distance,
  suits,
)
from jaxdia.gradients.matching import (
  METHODS,
  Factors,
  Method,
  Prepared,
  Target,
  choose_layers,
  compare,
  factorize,
  layer_gradient,
  prepare,
)
from jaxdia.gradients.rounding import RoundingLevel, find_rounding

__all__ = [
  "DISTANCES",
  "METHODS",
  "Comparison",
  "Factors",
  "Method",
  "Prepared",
  "RoundingLevel",
  "Target",
  "choose_layers",
  "compare",
  "cosine_distance",
  "factorize",
  "find_rounding",
  "layer_gradient",
  "noise_distance",
  "prepare",
  "squared_l2_distance",
  "suits",
]
