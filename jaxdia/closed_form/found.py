"""The parts of a batch, while they are put together."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer

from jaxdia.client import Observation
from jaxdia.closed_form.labels import recover_labels
from jaxdia.closed_form.parts import NO_LABEL, Parts, Recovery, Verdict
from jaxdia.closed_form.sparse import LEAST_GAP, MOST_ROUNDING, bounds, split_zeros
from jaxdia.core.errors import InputError
from jaxdia.core.types import Array
from jaxdia.models import Convolution, DenseLayer, DropoutModel, batch_axes, expected_masks

# A sample that leaves no more than this of the gradient unexplained, relative, is exact.
EXACT = 1e-3
# A sample fits a gradient of which it leaves no more than so many times what rounding changed, but
# never one of which it leaves more than this.
OF_ROUNDING, _MOST_LEFT = 10, 0.1


# So thresholds that go with rounding grow no more from this share of it on.
MOST_ALLOWED = _MOST_LEFT / OF_ROUNDING


def tolerance_of(rounding: float | Float[Array, "*samples"]) -> Float[Array, "*samples"]:
  """Returns the share of a gradient that a sample which fits it may leave unexplained, f[...].

  Args:
    rounding: share of the gradient that rounding changed, of one sample or of several.
  """
  return jnp.clip(OF_ROUNDING * rounding, EXACT, _MOST_LEFT)


class Found:
  """The parts, while they are put together.

  Attributes:
    parts: so far.
    residual: f64[B], as in `Recovery`.
    error: f64[B], likewise.
    scale: likewise.
    note: what is to be said even if all images are exact.
    rounding: share of the gradient that rounding changed.
    pruned: whether a part of the gradient was not sent, of which nothing is called exact.
    tolerance: a sample that leaves no more of the gradient unexplained, relative, fits it.
    determined: b[B], as in `Recovery`.
  """

  def __init__(self, model: DropoutModel, observation: Observation, rounding: float):
    """Begins with nothing found but labels.

    Args:
      model: the network.
      observation: of one client.
      rounding: share of the gradient that rounding changed.
    """
    size = observation.batch_size
    self.dtype = observation.dtype
    self.axes = batch_axes(model)
    self.residual = np.full(size, np.nan)
    self.error = np.full(size, np.nan)
    self.scale = math.nan
    self.note = ""
    self.set_rounding(rounding)
    self.pruned = False
    self.determined = np.zeros(size, bool)
    masks = expected_masks(model, size, jnp.float64)
    told = True
    if observation.labels is not None:
      labels = np.asarray(observation.labels)
    else:
      try:
        labels = np.asarray(recover_labels(model, observation))
      except InputError:
        labels, told = np.full(size, NO_LABEL, np.int32), False  # images are read without them
    self.parts = Parts(
      images=np.zeros((size, *model.image_shape)),
      verdict=np.full(size, Verdict.NOT_APPLICABLE, np.int32),
      masks=jax.tree.map(np.array, masks),
      known_masks={site: np.zeros(mask.shape, bool) for site, mask in masks.items()},
      labels=labels,
      known_labels=np.full(size, size == 1 and told),
      features={},
      known_features={},
    )

  def set_rounding(self, rounding: float) -> None:
    """Notes a share of the gradient that rounding or noise changed."""
    self.rounding = rounding
    self.tolerance = float(tolerance_of(rounding))

  def set_label(self, number: int, label: int) -> None:
    """Gives an image its label, and the others those that are left.

    Args:
      number: of the image.
      label: its class.
    """
    labels, known = self.parts.labels.copy(), self.parts.known_labels
    others = [i for i in range(len(labels)) if i != number and not known[i]]
    if not known[number] and labels[number] != label:
      for i in others:
        if labels[i] == label:
          labels[i] = labels[number]
          break
    labels[number] = label
    known[number] = True
    self.parts = self.parts._replace(labels=labels)

  def set_mask(
    self,
    site: str | None,
    number: int,
    entries: Integer[np.ndarray, " n"],
    kept: Float[np.ndarray, " n"],
    sure: Bool[np.ndarray, " n"] | bool = True,
  ) -> None:
    """Notes the entries of an image's part of a mask.

    Args:
      site: of the mask; nothing is noted for None, or for a mask that images share.
      number: of the image.
      entries: i[n], their indices; -1 for one that nothing tells.
      kept: f[n], 1 or 0.
      sure: b[n], entries that are known; the others are guesses.
    """
    if site is None or self.axes[site] != 0 or len(self.parts.masks[site]) != len(self.residual):
      return
    told = entries >= 0
    self.parts.masks[site][number].reshape(-1)[entries[told]] = kept[told]
    sure = np.broadcast_to(sure, told.shape)
    self.parts.known_masks[site][number].reshape(-1)[entries[told]] = sure[told]

  def declare_features(self, layer: DenseLayer | Convolution) -> None:
    """Makes room for the inputs of a layer."""
    size = len(self.residual)
    self.parts.features[layer.path] = np.zeros((size, layer.inputs))
    self.parts.known_features[layer.path] = np.zeros(size, bool)

  def set_features(
    self, path: tuple[str, ...], number: int, features: Float[np.ndarray, " inputs"]
  ) -> None:
    """Notes the inputs of a layer.

    Args:
      path: of the layer, which was declared.
      number: of the image.
      features: f64[inputs].
    """
    self.parts.features[path][number] = features
    self.parts.known_features[path][number] = True

  def set_image(
    self,
    number: int,
    image: Float[np.ndarray, "height width channels"],
    residual: float,
    determined: bool = True,
  ) -> None:
    """Notes an image, and how far it can be believed.

    Args:
      number: of the image.
      image: f64[H, W, C], normalised.
      residual: share of its part of the gradient that it leaves unexplained.
      determined: whether the equations tell all of its pixels.
    """
    self.parts.images[number] = image
    self.determined[number] = determined and residual <= self.tolerance
    exact = determined and residual <= EXACT and self.rounding <= MOST_ROUNDING and not self.pruned
    if self.determined[number] and not exact and np.isnan(self.error[number]):
      self.error[number] = residual * np.sqrt(np.mean(np.square(image)))
    self.parts.verdict[number] = Verdict.EXACT if exact else Verdict.APPROXIMATE

  def forget_mask(self, site: str, mean: float) -> None:
    """Takes a mask back.

    Args:
      site: of the mask.
      mean: of its entries, by its rate.
    """
    self.parts.masks[site][:], self.parts.known_masks[site][:] = mean, False

  def doubt_scale(self) -> None:
    """Takes back what goes with the size of the images."""
    exact = self.parts.verdict == Verdict.EXACT
    self.parts.verdict[exact] = Verdict.APPROXIMATE
    for known in self.parts.known_masks.values():
      known[:] = False
    self.determined[:], self.error[:], self.scale = False, np.nan, math.nan

  def kept_features(
    self, features: Float[np.ndarray, " n"], rate: float
  ) -> Float[np.ndarray, " n"] | None:
    """Returns which inputs of a layer were kept, if those that were dropped stand out.

    Args:
      features: f64[n].
      rate: of dropout.

    Returns:
      f64[n], 1 or 0.
    """
    least, most = bounds(features.size, 1.0, rate)
    zeros = split_zeros(features, np.ones(features.size), least, most, self.rounding)
    return 1.0 - np.asarray(zeros.zero) if zeros.gap > LEAST_GAP else None

  def recovery(self, reason: str) -> Recovery:
    """Returns the result, with the reason why there is not more."""
    parts = jax.tree.map(lambda x: x.astype(self.dtype) if x.dtype == np.float64 else x, self.parts)
    if (parts.verdict == Verdict.EXACT).all():
      reason = ""
    elif self.determined.all() and not self.pruned:
      reason = (
        f"rounding or noise changed {self.rounding:.1e} of the gradient, so the pixels are"
        f" known up to a standard error of about {np.nanmax(self.error):.1e}"
      )
    return Recovery(
      parts, self.residual, self.note or reason, self.scale, self.error, self.determined
    )
