"""What a network is made of, found by calling it.

A closed form holds for a certain structure: dense layers with elementwise functions
and dropout between them, or patches to which a position embedding is added. A
network is an opaque function, so the structure is not read but tried: with
chosen parameters, masks and taps, and in float64, where what must be equal is.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from jaxdia.core.errors import InputError, first_line
from jaxdia.core.trees import Path, leaves_by_path, with_leaves
from jaxdia.core.types import Array, Images, Masks, Params
from jaxdia.models import Convolution, DenseLayer, DropoutModel, Network, discovery, model_of

# Two numbers that should be equal differ by less, relative to the largest of their array.
_TOLERANCE = 1e-9
# A function that is zero for more than this share of random outputs is called silent.
_SILENT = 0.1


@dataclasses.dataclass(frozen=True)
class Input:
  """Where the inputs of a dense layer come from.

  Attributes:
    site: name of the dropout site that multiplies them, or None.
    entries: i[inputs], which entry of an image's part of that mask each one meets; -1
      for an input that is always 0.
  """

  site: str | None = None
  entries: Integer[np.ndarray, " inputs"] | None = None


class Link(NamedTuple):
  """What the function of single entries between two layers is like.

  Attributes:
    silent: whether it is zero, and its slope too, for many outputs, as a ReLU is.
    homogeneous: whether of twice the output it is twice as large, as a ReLU is, leaky or not.
  """

  silent: bool
  homogeneous: bool


class LayerChain(NamedTuple):
  """Linear layers of a row an image, with functions of single entries between.

  Attributes:
    layers: dense ones, up to the classifier; or convolutions, up to one of those.
    inputs: of each layer.
    pixels: i[1, inputs], which pixel each input of the first layer is; None if
      these are features.
    links: the functions between the layers.
    biased: whether any layer has a bias.
  """

  layers: tuple[DenseLayer | Convolution, ...]
  inputs: tuple[Input, ...]
  pixels: Integer[np.ndarray, "1 inputs"] | None
  links: tuple[Link, ...]
  biased: bool

  @property
  def homogeneous(self) -> bool:
    """Whether twice the inputs of the first layer are twice the outputs of the last."""
    return not self.biased and all(link.homogeneous for link in self.links)


def probing_params(model: DropoutModel) -> Params:
  """Returns parameters, f64, of the usual size and of which none is zero."""
  shapes, tree = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))

  def draw(number, shape):
    values = _random(number, shape) * np.prod(shape[:-1]) ** -0.5
    return values if len(shape) > 1 else jnp.abs(values)  # so that few a ReLU stays dead

  return jax.tree.unflatten(tree, [draw(i, x.shape) for i, x in enumerate(shapes)])


def model_to_try(network: Network) -> DropoutModel:
  """Returns a network at rates above 0, on which its structure does not depend."""
  # Of plain functions the rates are no part of the network.
  return model_of(network, dict.fromkeys(discovery.discover(network, 2).sites, 0.5))


@functools.lru_cache
def find_chain(network: Network) -> LayerChain | None:
  """Finds the dense layers at the end of a network.

  Args:
    network: of a model.

  Returns:
    The longest chain that ends with the classifier; None if the model has no
    known classifier, or it cannot be tapped.

  Raises:
    InputError: the network cannot be computed on one image and in float64, by which its structure
      is tried.
  """
  model = model_to_try(network)
  _check_single(model)
  _check_float64(model)
  shapes = leaves_by_path(jax.eval_shape(model.init, jax.random.key(0)))
  layers = [layer for layer in model.dense(1) if layer.rows == (1,)]
  layers = [layer for layer in layers if len(shapes[(*layer.path, "kernel")].shape) == 2]
  paths = [layer.path for layer in layers]
  if model.classifier not in paths:
    return None
  last = first = paths.index(model.classifier)
  alone = last == 0 or not mixes_images(network)
  with jax.enable_x64(True):
    params = probing_params(model)
    links: list[Link] = []
    while alone and first > 0:
      link = _find_link(model, params, layers[first - 1], layers[first])
      if link is None:
        break
      links.insert(0, link)
      first -= 1
    return _chain(model, params, layers[first : last + 1], links)


def _check_single(model: DropoutModel) -> None:
  """Refuses a network that takes several images only, as BatchNorm does of one value a channel."""
  try:
    model.dense(1)
  except InputError as error:
    cause = first_line(error.__cause__ or error)
    raise InputError(f"the network cannot be computed on one image alone ({cause})") from error


def _check_float64(model: DropoutModel) -> None:
  """Refuses a network such as a loop that carries float32, whatever it is given."""

  def call():
    images = jnp.zeros((1, *model.image_shape), jnp.float64)
    return model.apply(probing_params(model), None, images)

  try:
    with jax.enable_x64(True):
      jax.eval_shape(call)
  except TypeError as error:
    raise InputError(f"the network cannot be computed in float64 ({first_line(error)})") from error


@functools.lru_cache
def mixes_images(network: Network) -> bool:
  """Returns whether the logits of an image depend on the others of its batch, as in BatchNorm.

  Args:
    network: of a model.
  """
  model = model_to_try(network)
  with jax.enable_x64(True):
    images = _random(0, (2, *model.image_shape))
    apply = jax.jit(model.apply)
    masks = full_masks(model, 2)
    params = probing_params(model)
    logits = [apply(params, masks, x)[0] for x in (images, images.at[1].multiply(0.5))]
    return not close(*logits)


@functools.lru_cache
def find_convolutions(network: Network, after: DenseLayer) -> LayerChain | None:
  """Finds the convolutions that a dense layer is fed by.

  Args:
    network: of a model.
    after: the dense layer, with one row an image.

  Returns:
    The longest chain that ends just before it, or None.
  """
  model = model_to_try(network)
  found: list[DenseLayer | Convolution] = [after]
  with jax.enable_x64(True):
    params = probing_params(model)
    links: list[Link] = []
    for layer in reversed(model.convolutions):
      link = _find_link(model, params, layer, found[0])
      if link is None:
        break
      found.insert(0, layer)
      links.insert(0, link)
    return _chain(model, params, found[:-1], links) if links else None


def _chain(model, params, layers, links) -> LayerChain:
  inputs = [_find_input(model, params, layer) for layer in layers]
  for k in range(1, len(layers)):
    if links[k - 1].silent:
      inputs[k] = _without_gaps(inputs[k])
  leaves = leaves_by_path(params)
  biased = any((*layer.path, "bias") in leaves for layer in layers)
  pixels = find_pixels(model, params, layers[0])
  return LayerChain(tuple(layers), tuple(inputs), pixels, tuple(links), biased)


def _without_gaps(source: Input) -> Input:
  """Returns an input of which units that were off in all trials meet their own entries."""
  if source.entries is None:
    return source
  own = np.arange(source.entries.size)
  in_order = np.all((source.entries == -1) | (source.entries == own))
  return dataclasses.replace(source, entries=own) if in_order else source


def full_masks(model: DropoutModel, batch_size: int = 1) -> Masks:
  """Returns masks that keep every entry: {site: f64[shape] of ones}."""
  return {
    site: jnp.ones(shape, jnp.float64) for site, shape in model.mask_shapes(batch_size).items()
  }


@functools.partial(jax.jit, static_argnums=2)
def layer_inputs(
  model: DropoutModel,
  params: Params,
  layer: DenseLayer | Convolution,
  masks: Masks,
  images: Float[Array, "1 height width channels"],
) -> Float[Array, "rows inputs"]:
  """Returns the inputs of a layer, f64[rows, inputs].

  Args:
    model: the network.
    params: its parameters.
    layer: whose inputs are wanted.
    masks: of one image.
    images: f64[1, H, W, C].
  """
  taps = {layer.path: tuple(jnp.zeros((rows, layer.outputs)) for rows in layer.rows)}
  return jnp.concatenate(model.apply_tapped(params, masks, images, taps)[1][layer.path])


def activate(
  model: DropoutModel,
  params: Params,
  layer: DenseLayer | Convolution,
  after: DenseLayer | Convolution,
  outputs: Float[Array, " outputs"],
  images: Float[Array, "1 height width channels"] | None = None,
) -> Float[Array, " inputs"]:
  """Returns the inputs of a layer of a chain as a function of the outputs before it.

  Args:
    model: the network.
    params: its parameters.
    layer: of the chain, with one row an image.
    after: the next one.
    outputs: f64[outputs], of `layer`.
    images: f64[1, H, W, C], which make no difference in a chain.

  Returns:
    f64[inputs], of `after`, with nothing dropped (but scaled as by dropout).
  """
  silent = replace_layer(params, layer.path, jnp.zeros_like)
  taps = {
    layer.path: (outputs[None],),
    after.path: (jnp.zeros((1, after.outputs), outputs.dtype),),
  }
  if images is None:
    images = jnp.zeros((1, *model.image_shape), outputs.dtype)
  return model.apply_tapped(silent, full_masks(model), images, taps)[1][after.path][0][0]


def replace_layer(params: Params, path: Path, change: Callable[[Any], Any]) -> Params:
  """Returns params with `change` applied to the leaves of one layer.

  Args:
    params: of the network.
    path: of the layer.
    change: of a leaf.
  """
  leaves = leaves_by_path(params).items()
  return with_leaves(params, {p: change(x) if p[:-1] == path else x for p, x in leaves})


def close(
  a: Float[Array, "*shape"], b: Float[Array, "*shape"], tolerance: float = _TOLERANCE
) -> bool:
  """Returns whether arrays are equal up to rounding, by default that of float64."""
  return bool(jnp.max(jnp.abs(a - b)) <= tolerance * (jnp.max(jnp.abs(b)) + 1e-30))


def _random(number: int, shape) -> jax.Array:
  return jnp.asarray(np.random.default_rng(number).standard_normal(shape))


def _find_link(model, params, layer, after) -> Link | None:
  """Returns the function that makes each input of `after` of one output of `layer`, if one does."""
  if layer.outputs != after.inputs:
    return None

  @jax.jit
  def probe(params, outputs, direction, images):
    def inputs_after(outputs):
      return activate(model, params, layer, after, outputs, images)

    expected, slope = jax.jvp(inputs_after, (outputs,), (jnp.ones_like(outputs),))
    _, along = jax.jvp(inputs_after, (outputs,), (direction,))
    # The image itself reaches `after` on no other way.
    other = activate(model, params, layer, after, outputs)
    return along, slope * direction, expected, other, inputs_after(2 * outputs)

  along, expected_along, expected, other, twice = probe(
    params,
    _random(0, layer.outputs),
    _random(1, layer.outputs),
    _random(2, (1, *model.image_shape)),
  )
  if not (close(along, expected_along) and close(other, expected)):
    return None
  silent = np.mean((np.asarray(expected) == 0) & (np.asarray(expected_along) == 0))
  return Link(bool(silent > _SILENT), close(twice, 2 * expected))


def _find_input(model, params, layer) -> Input:
  """Finds the dropout site that multiplies the inputs of a layer."""

  def inputs_of(masks, images):
    return layer_inputs(model, params, layer, masks, images)[0]

  return find_input(model, inputs_of)


def find_input(
  model: DropoutModel,
  inputs_of: Callable[[Masks, Images], Float[Array, " n"]],
  tolerance: float = _TOLERANCE,
) -> Input:
  """Finds the dropout site that multiplies inputs.

  Args:
    model: the network.
    inputs_of: the inputs f64[n] of masks and of an image f64[1, H, W, C].
    tolerance: what rounding may make of them, relative to the largest.

  Returns:
    The site, if there is one.
  """
  ones = full_masks(model)
  # Several images, since an input that is 0 tells nothing.
  images = [_random(i, (1, *model.image_shape)) for i in range(4)]
  value = inputs_of(ones, images[0])
  for site, mask in ones.items():
    # Twice the mask of the wanted site is twice the inputs.
    if not close(inputs_of(ones | {site: 2 * mask}, images[0]), 2 * value, tolerance):
      continue
    # A mask of which no two entries are alike tells which one each input met.
    values = 1 + np.arange(mask.size) / mask.size
    masks = ones | {site: jnp.asarray(values.reshape(mask.shape))}
    before, after = (np.stack([inputs_of(m, x) for x in images], 1) for m in (ones, masks))
    best = np.argmax(np.abs(before), axis=1)[:, None]
    before, after = (np.take_along_axis(x, best, axis=1)[:, 0] for x in (before, after))
    seen = before != 0
    ratios = np.divide(after, before, out=np.ones_like(after), where=seen)
    entries = np.rint((ratios - 1) * values.size).astype(int)
    in_range = (entries >= 0) & (entries < values.size)
    if seen.any() and in_range.all() and close(before * values[entries], after, tolerance):
      return Input(site, np.where(seen, entries, -1))
  return Input()


def find_pixels(
  model: DropoutModel, params: Params, layer: DenseLayer | Convolution
) -> Integer[np.ndarray, "rows inputs"] | None:
  """Finds which pixel each input of a layer is, if they are all the pixels, each once.

  Args:
    model: the network.
    params: its parameters, f64.
    layer: one that is called once.

  Returns:
    i[rows, inputs], indices into the flattened image; None if the inputs are not pixels.
  """
  size = int(np.prod(model.image_shape))
  if len(layer.rows) != 1 or layer.rows[0] * layer.inputs != size:
    return None
  images = jnp.arange(size, dtype=jnp.float64).reshape(1, *model.image_shape)
  found = np.asarray(layer_inputs(model, params, layer, full_masks(model), images))
  if not np.array_equal(np.sort(found.ravel()), np.arange(size)):
    return None
  return found.astype(int)
