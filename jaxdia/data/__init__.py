"""Images to attack: float32 NHWC in [0, 1], with the statistics that normalise them."""

from jaxdia.core.types import Statistics
from jaxdia.data.datasets import DATASETS, NEUTRAL, STATISTICS, Dataset, statistics_of
from jaxdia.data.features import denormalize_features, normalize_features
from jaxdia.data.pixels import denormalize, normalize
from jaxdia.data.victims import (
  MOST_CLASSES,
  MOST_PIXELS_A_SIDE,
  Victims,
  available,
  check_source,
  load,
)

__all__ = [
  "DATASETS",
  "MOST_CLASSES",
  "MOST_PIXELS_A_SIDE",
  "NEUTRAL",
  "STATISTICS",
  "Dataset",
  "Statistics",
  "Victims",
  "available",
  "check_source",
  "denormalize",
  "denormalize_features",
  "load",
  "normalize",
  "normalize_features",
  "statistics_of",
]
