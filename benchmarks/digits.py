"""The handwritten digits that scikit-learn ships, to train on and to attack."""

import numpy as np

from jaxdia import data
from jaxdia.core.errors import InputError

TRAINING = 1400  # of 1,797 images


def load() -> tuple[data.Victims, data.Victims]:
  """Returns 1,400 digits to train on, and the others, f32[N, 8, 8, 1], in random order.

  The pixels of those to train on are the statistics of both.

  Raises:
    InputError: scikit-learn is not installed.
  """
  try:
    from sklearn.datasets import load_digits
  except ImportError as error:
    raise InputError("digits need scikit-learn; run pip install scikit-learn.") from error
  digits = load_digits()
  order = np.random.default_rng(0).permutation(len(digits.images))
  images = digits.images[order, :, :, None].astype(np.float32) / 16
  labels = digits.target[order].astype(np.int32)
  pixels = images[:TRAINING]
  statistics = data.Statistics(float(pixels.mean()), float(pixels.std()))
  parts = slice(None, TRAINING), slice(TRAINING, None)
  first, second = (data.Victims(images[p], labels[p], 10, statistics) for p in parts)
  return first, second
