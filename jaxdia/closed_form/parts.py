"""What closed forms give: parts of a batch, and how well each is known."""

import enum
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer

from jaxdia.core.types import Array, Images, Labels, Masks

# In place of a label that nothing tells.
NO_LABEL = -1


class Verdict(enum.IntEnum):
  """How well an image of the batch is known."""

  NOT_APPLICABLE = 0
  APPROXIMATE = 1
  EXACT = 2


class Parts(NamedTuple):
  """What was recovered of a batch, and which of it; leaves have the shapes of the batch.

  Attributes:
    images: f[B, H, W, C], normalised; zeros where the verdict is not applicable.
    verdict: i[B], a `Verdict` on each image.
    masks: {site: f[shape]}; where they are not known, the most likely or the expected ones.
    known_masks: {site: b[shape]}.
    labels: i[B]; where they are not known, the most likely ones; NO_LABEL if none can be read.
    known_labels: b[B], labels that belong to the image in their place.
    features: {path of a layer: f[B, inputs]}; zeros where not known.
    known_features: {path: b[B]}.
  """

  images: Images
  verdict: Integer[Array, " batch"]
  masks: Masks
  known_masks: Masks
  labels: Labels
  known_labels: Bool[Array, " batch"]
  features: dict[tuple[str, ...], Float[Array, "batch _"]]
  known_features: dict[tuple[str, ...], Bool[Array, " batch"]]


class Recovery(NamedTuple):
  """The result of the closed forms.

  Attributes:
    parts: what was recovered; the images in no particular order.
    residual: f[B], the share of the gradient that each image or its features leave unexplained;
      NaN where there are none.
    reason: why there is not more, for a person to read; empty if all is exact.
    scale: by which factor the gradient exceeds that of the loss, 1 up to rounding if it is of that
      loss; NaN where that is not known. Nothing else depends on it.
    error: f[B], standard error of the pixels of an image, where its equations tell; else NaN. That
      of an image which only the rounding of the gradient keeps from being exact is rather too
      large.
    determined: b[B], images that the equations determine up to the rounding of the gradient: those
      that are exact, and those that would be but for it.
  """

  parts: Parts
  residual: Float[Array, " batch"]
  reason: str
  scale: float = math.nan
  error: Float[np.ndarray, " batch"] | float = math.nan
  determined: Bool[np.ndarray, " batch"] | bool = False

  def summary(self) -> str:
    """Returns how many images are exact or approximate, and why not more, in one line."""
    counts = {v: int(np.sum(np.asarray(self.parts.verdict) == v)) for v in reversed(Verdict)}
    words = [f"{n} {v.name.lower().replace('_', ' ')}" for v, n in counts.items() if n]
    return ", ".join(words) + (f" ({self.reason})" if self.reason else "")
