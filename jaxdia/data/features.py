"""Rows of tables and sequences of features as images: normalised columns with their own box."""

import numpy as np
from jaxtyping import Float

from jaxdia.core.errors import InputError
from jaxdia.core.types import Array, FeaturesLike, Statistics


def normalize_features(
  values: FeaturesLike,
) -> tuple[Float[np.ndarray, "rows frames one features"], Statistics]:
  """Standardises the columns of features, and says which values are valid.

  Args:
    values: f[N, features], rows of a table, or f[N, frames, features], sequences of one length.
      Categories are columns of 0 and 1 each.

  Returns:
    f32[N, frames, 1, features] for `jaxdia.client.observe`, a table with one frame, and the
    statistics of columns, which make the box of valid values: from the least to the largest of
    each column. `denormalize_features` undoes it.

  Raises:
    InputError: the values are no such array of finite numbers.
  """
  numbers = np.asarray(values, np.float64)
  if numbers.ndim not in (2, 3) or not numbers.size or not np.isfinite(numbers).all():
    raise InputError(
      f"features have the shape {numbers.shape}; expected finite numbers of shape (rows, features)"
      " or (rows, frames, features)."
    )
  rows = numbers.reshape(len(numbers), -1, 1, numbers.shape[-1])
  columns = rows.reshape(-1, rows.shape[-1])
  mean, std = _moments(columns)
  statistics = Statistics.of_box(mean, std, columns.min(axis=0), columns.max(axis=0))
  return ((rows - mean) / std).astype(np.float32), statistics


def denormalize_features(
  images: Float[Array, "batch frames one features"], values: FeaturesLike
) -> Float[np.ndarray, "batch *frames features"]:
  """Returns reconstructions in the units of the features.

  Args:
    images: f[B, frames, 1, features], normalised as `normalize_features(values)` is.
    values: that gave the statistics.

  Returns:
    f[B, features] for a table, else f[B, frames, features].
  """
  numbers = np.asarray(values, np.float64)
  mean, std = _moments(numbers.reshape(-1, numbers.shape[-1]))
  found = np.asarray(images, np.float64) * std + mean
  return found.reshape(len(found), *numbers.shape[1:])


def _moments(
  columns: Float[np.ndarray, "rows features"],
) -> tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]]:
  """Returns means and standard deviations of columns; 1 for one that is constant."""
  std = columns.std(axis=0)
  return columns.mean(axis=0), np.where(std > 0, std, 1)
