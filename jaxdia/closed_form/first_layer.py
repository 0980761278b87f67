"""The image of a single-image batch, from a first dense layer with a bias and nothing else.

With one row of inputs `x` the gradient of the kernel is `dW = x ⊗ db`, whatever comes after the
layer. So each output j whose bias has a gradient tells the whole image, `x = dW[:, j] / db[j]`, and
all together tell how well it is known (Phong et al. 2018; Geiping et al. 2020).
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from jaxdia.closed_form.structure import (
  Input,
  close,
  find_input,
  full_masks,
  model_to_try,
  probing_params,
)
from jaxdia.core.trees import Path, leaves_by_path
from jaxdia.models import Network

# No more kernels with a bias are tried.
_MOST_PLACES = 8
# What rounding may make of inputs, relative to the largest: a network may cast its images to
# float32. A function that is no more bent than that leaves the image as exact as it is read.
_TOLERANCE = 1e-5
# So many entries of the same largest size were clipped to it.
_CLIPPED = 4


def name_of(kernel: Path, bias: Path | None) -> str:
  """Returns what messages call a layer: what its kernel and its bias lie in, or the kernel.

  Args:
    kernel: path of its kernel.
    bias: path of its bias, if it has one.
  """
  pairs = zip(kernel, bias or kernel[:-1], strict=False)
  common = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
  return "/".join(common or kernel)


class FirstLayer(NamedTuple):
  """A dense layer that is fed with one row of pixels an image, `factors * pixel + shifts`.

  Attributes:
    kernel: path of its kernel, which may have any name.
    bias: path of its bias.
    turned: whether the kernel is [outputs, inputs].
    pixels: i[inputs], index into the flattened image of each input; 0 for constants.
    factors: f64[inputs], in evaluation mode; 0 for constants.
    shifts: f64[inputs].
    source: the dropout that multiplies its inputs, if any.
  """

  kernel: Path
  bias: Path
  turned: bool
  pixels: Integer[np.ndarray, " inputs"]
  factors: Float[np.ndarray, " inputs"]
  shifts: Float[np.ndarray, " inputs"]
  source: Input

  @property
  def name(self) -> str:
    """What messages call the layer."""
    return name_of(self.kernel, self.bias)

  def read(self, leaves: Mapping[Path, Any]) -> "Inputs | None":
    """Returns what a gradient says of its inputs; None if a part of it was not sent.

    Args:
      leaves: of the gradient, by path.
    """
    kernel, bias = leaves.get(self.kernel), leaves.get(self.bias)
    if kernel is None or bias is None:
      return None
    kernel = np.asarray(kernel)
    return read_inputs(kernel.T if self.turned else kernel, np.asarray(bias))


class Inputs(NamedTuple):
  """What the gradient says of the inputs of a dense layer.

  Attributes:
    values: f64[inputs].
    errors: f64[inputs], standard errors, from how much the outputs disagree.
    residual: f[], the share of the kernel's gradient that they leave unexplained.
    checked: whether most inputs are told by several outputs, which could disagree.
  """

  values: Float[np.ndarray, " inputs"]
  errors: Float[np.ndarray, " inputs"]
  residual: float
  checked: bool


@functools.lru_cache
def find_first_layer(network: Network) -> FirstLayer | None:
  """Finds a dense layer with a bias that is fed with the pixels of an image.

  That it is so is tried, by gradients of the network alone: so the layer may be inside a
  transformation such as remat, and what comes after it does not matter.

  Args:
    network: of a model.

  Returns:
    The layer; None if there is none.
  """
  model = model_to_try(network)
  size = int(np.prod(model.image_shape))
  drawn = jax.eval_shape(model.init, jax.random.key(0))
  shapes = {path: leaf.shape for path, leaf in leaves_by_path(drawn).items()}
  places = _places(shapes, size)
  if not places:
    return None
  wanted = {path for kernel, bias, _ in places for path in (kernel, bias)}
  with jax.enable_x64(True):
    params = probing_params(model)
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((1, model.num_classes)))

    @jax.jit
    def gradients(params, masks, images):
      gradient = jax.grad(lambda p: jnp.sum(weights * model.apply(p, masks, images)))(params)
      return {path: leaf for path, leaf in leaves_by_path(gradient).items() if path in wanted}

    for place in places:
      found = _try(model, params, place, gradients)
      if found is not None:
        return found
  return None


def _places(shapes, size) -> list[tuple[Path, Path, bool]]:
  """Returns what may be a kernel and its bias by their shapes, and whether the kernel is turned.

  Those that lie together come first, as by chance others may have these shapes too.
  """
  vectors = [(path, shape[0]) for path, shape in shapes.items() if len(shape) == 1]
  places = []
  for path, shape in shapes.items():
    for turned in (False, True):
      inputs, outputs = (shape if len(shape) == 2 else (0, 0))[:: -1 if turned else 1]
      if inputs >= size:
        places += [(path, bias, turned) for bias, count in vectors if count == outputs]
  together = sorted(places, key=lambda place: place[0][:-1] != place[1][:-1])
  return together[:_MOST_PLACES]


def _try(model, params, place, gradients) -> FirstLayer | None:
  kernel, bias, turned = place
  nothing = np.zeros(0)
  layer = FirstLayer(kernel, bias, turned, nothing, nothing, nothing, Input())

  def inputs_of(masks, image):
    leaves = gradients(params, masks, jnp.asarray(image).reshape(1, *model.image_shape))
    read = layer.read(leaves)
    assert read is not None  # all of them were asked for
    return read.values if read.residual < _TOLERANCE else np.full(len(read.values), np.nan)

  size = int(np.prod(model.image_shape))
  expected = {s.name: (1 - s.rate) * full_masks(model)[s.name] for s in model.sites}
  none, one = (inputs_of(expected, np.full(size, value)) for value in (0.0, 1.0))
  # A pixel of each value tells which one each input is.
  each = inputs_of(expected, np.arange(size) / size)
  if not all(np.isfinite(x).all() for x in (none, one, each)):
    return None
  factors = one - none
  varies = np.abs(factors) > _TOLERANCE * np.max(np.abs([none, one]))
  pixels = np.rint(np.divide(each - none, factors, out=np.zeros_like(each), where=varies) * size)
  pixels = np.clip(pixels.astype(int), 0, size - 1)
  factors = np.where(varies, factors, 0)
  image = np.random.default_rng(1).standard_normal(size)
  complete = len(np.unique(pixels[varies])) == size
  found = inputs_of(expected, image)
  if not complete or not close(found, factors * image[pixels] + none, _TOLERANCE):
    return None
  source = find_input(model, inputs_of, _TOLERANCE)
  return layer._replace(pixels=pixels, factors=factors, shifts=none, source=source)


def read_inputs(
  kernel: Float[np.ndarray, "inputs outputs"], bias: Float[np.ndarray, " outputs"]
) -> Inputs:
  """Returns the inputs of a dense layer with one row, by weighted least squares over its outputs.

  Entries are left out where there are others of the same input: those that are zero (the gradient
  was pruned), and those that were clipped to one value.

  Args:
    kernel: f64[inputs, outputs], its gradient.
    bias: f64[outputs], its gradient.

  Returns:
    The inputs; an input all of whose entries were pruned is 0, with the error that this allows.
  """
  sizes = np.abs(kernel)
  limit = max(np.max(sizes), np.max(np.abs(bias)))
  clipped = np.sum(sizes == limit) + np.sum(np.abs(bias) == limit) >= _CLIPPED
  told = (bias != 0) & ~(clipped & (np.abs(bias) == limit))
  used = told[None] & (sizes != 0) & ~(clipped & (sizes == limit))
  # Of an input that has no others, those too; they may be equal and not clipped.
  used |= told[None] & (sizes != 0) & ~used.any(axis=1, keepdims=True)
  seen = used.any(axis=1)
  pruned = bool(np.any(seen[:, None] & told[None] & (sizes == 0)))
  pruned |= bool(np.any((bias == 0)[None] & (sizes != 0)))
  support = used * np.square(bias)[None]
  total = np.maximum(support.sum(axis=1), np.finfo(float).tiny)
  values = (used * kernel) @ bias / total
  left = used * (kernel - np.outer(values, bias))
  counts, squares = np.maximum(used.sum(axis=1) - 1, 0), np.sum(np.square(left), axis=1)
  # An input that one output alone tells cannot disagree; its error is as that of the others.
  common = np.sum(squares) / max(np.sum(counts), 1)
  errors = np.where(counts > 0, squares / np.maximum(counts, 1), common)
  errors = np.where(seen, np.sqrt(errors / total), 0)
  if pruned and not seen.all():
    errors[~seen] = np.min(sizes[used]) / np.max(np.abs(bias[told]))
  whole = np.linalg.norm(used * kernel)
  nothing = 0.0 if told.any() else np.inf
  residual = float(np.linalg.norm(left) / whole) if whole > 0 else nothing
  errors = np.where(np.isfinite(errors), errors, 0)
  checked = bool(np.mean(counts[seen] > 0) > 0.5) if seen.any() else False
  return Inputs(np.where(seen, values, 0.0), errors, residual, checked)
