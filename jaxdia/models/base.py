"""A dropout model is a tuple of pure functions with the masks as an argument."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdia.core.errors import InputError
from jaxdia.core.types import Images, Key, Logits, Masks, Params


class Site(NamedTuple):
  """One place in a network where dropout acts.

  Attributes:
    name: where it is, such as "block_0/hidden_dropout"; its key in the masks.
    rate: the probability of an entry to be dropped, in [0, 1); f[] inside a program that
      serves several rates.
  """

  name: str
  rate: float | jax.Array


class DenseLayer(NamedTuple):
  """A dense layer `z = a @ kernel (+ bias)` whose inputs and outputs can be tapped.

  Attributes:
    path: where its parameters are; `kernel` f[inputs, outputs], and `bias` if it has one.
    rows: rows of `a` in each call of the layer: images times positions.
    inputs: columns of `a`.
    outputs: columns of `z`.
  """

  path: tuple[str, ...]
  rows: tuple[int, ...]
  inputs: int
  outputs: int


class Convolution(NamedTuple):
  """A convolution as a linear map of a whole image; tapped as a dense layer with a row an image.

  Attributes:
    path: where its parameters are; `kernel`, and `bias` if it has one.
    input_shape: (height, width, channels).
    output_shape: (height, width, channels).
    apply: `apply(leaves, inputs f[B, H, W, C]) -> f[B, H, W, C]`, the layer by itself.
  """

  path: tuple[str, ...]
  input_shape: tuple[int, int, int]
  output_shape: tuple[int, int, int]
  apply: Callable[[Params, jax.Array], jax.Array]

  @property
  def rows(self) -> tuple[int, ...]:
    """Rows for one image in its only call."""
    return (1,)

  @property
  def inputs(self) -> int:
    """Columns of its inputs, which are flattened."""
    return math.prod(self.input_shape)

  @property
  def outputs(self) -> int:
    """Columns of its outputs, which are flattened."""
    return math.prod(self.output_shape)


# {path of a layer: one array for each of its calls}
Taps = dict[tuple[str, ...], tuple[jax.Array, ...]]


class DropoutModel(NamedTuple):
  """A classifier whose dropout masks are an explicit argument.

  It knows nothing of the library that the network was written in. A network
  without dropout has no sites, and its masks are the empty dictionary.

  Attributes:
    init: `init(key) -> params`.
    apply: `apply(params, masks, images) -> logits`, where a site computes
      `h * mask / (1 - rate)`. Pure: no random key inside.
    mask_shapes: `mask_shapes(batch_size) -> {site name: shape}`.
    sites: the dropout sites, in the order in which the network meets them.
    image_shape: (height, width, channels).
    num_classes: number of logits.
    classifier: path in `params` of the dense layer that gives the logits, whose
      gradient tells the labels; None if there is none or it is not known.
    dense: `dense(batch_size)` gives the dense layers that can be tapped; None if
      there are none or they are not known, as in a model of plain functions.
    convolutions: those that are called once and can be tapped.
    apply_tapped: `apply_tapped(params, masks, images, taps) -> (logits, inputs)`
      adds to the outputs of each call of the layers in `taps` the array that is
      there, f[rows, outputs], and returns the inputs f[rows, inputs] of the same
      calls; None where `dense` is.
    at_rates: `at_rates({site name: rate}) -> DropoutModel`, the same network with other
      rates, which may be traced: one compiled program then serves them all. Models of one
      network share it; None if there is no such function.
  """

  init: Callable[[Key], Params]
  apply: Callable[[Params, Masks, Images], Logits]
  mask_shapes: Callable[[int], dict[str, tuple[int, ...]]]
  sites: tuple[Site, ...]
  image_shape: tuple[int, int, int]
  num_classes: int
  classifier: tuple[str, ...] | None = None
  dense: Callable[[int], tuple[DenseLayer, ...]] | None = None
  convolutions: tuple[Convolution, ...] = ()
  apply_tapped: Callable[[Params, Masks, Images, Taps], tuple[Logits, Taps]] | None = None
  at_rates: Callable[[Mapping[str, float | jax.Array]], "DropoutModel"] | None = None

  @property
  def rates(self) -> dict[str, float | jax.Array]:
    """Returns {site name: rate}."""
    return {site.name: site.rate for site in self.sites}


def drop(inputs: jax.Array, mask: jax.Array, rate: float | jax.Array) -> jax.Array:
  """Applies one dropout mask: the only place that scales by 1 / (1 - rate).

  Args:
    inputs: f[...], the activations.
    mask: f[...], broadcastable to `inputs`; 1 = kept, 0 = dropped, and what an
      attack tries lies between.
    rate: the probability of an entry to be dropped.

  Returns:
    f[...]: with the expected mask, 1 - rate, exactly the inputs.
  """
  # The division comes first so that the expected mask gives a factor of exactly 1.
  return inputs * (mask / jnp.asarray(1 - rate, mask.dtype))


def sample_masks(key: Key, model: DropoutModel, batch_size: int, dtype=jnp.float32) -> Masks:
  """Draws masks as training does: each entry is kept with probability 1 - rate.

  Args:
    key: random key.
    model: whose sites to draw for.
    batch_size: number of images.
    dtype: floating-point type of the masks.

  Returns:
    {site name: f[shape]} of zeros and ones, for every type the same ones, but for the rounding
    of rates that are arrays.
  """
  shapes = model.mask_shapes(batch_size)
  return {
    site.name: jax.random.bernoulli(
      jax.random.fold_in(key, i), jnp.float32(1 - site.rate), shapes[site.name]
    ).astype(dtype)
    for i, site in enumerate(model.sites)
  }


def expected_masks(model: DropoutModel, batch_size: int, dtype=jnp.float32) -> Masks:
  """Returns the masks that make every site the identity: the evaluation mode.

  Args:
    model: whose sites to fill.
    batch_size: number of images.
    dtype: floating-point type of the masks.

  Returns:
    {site name: f[shape]}, everywhere 1 - rate.
  """
  shapes = model.mask_shapes(batch_size)
  return {s.name: jnp.full(shapes[s.name], 1 - s.rate, dtype) for s in model.sites}


def jit_for_all_rates(
  function: Callable[..., Any], static_argnums: tuple[int, ...] = ()
) -> Callable[..., Any]:
  """Compiles a function of a model once for all rates of its network.

  Args:
    function: whose first argument is a model.
    static_argnums: places of other arguments that are no arrays.

  Returns:
    The jitted function.
  """
  fixed = jax.jit(function, static_argnums=(0, *static_argnums))

  @functools.partial(jax.jit, static_argnums=(0, *(number + 1 for number in static_argnums)))
  def at_rates(network, rates, *arguments):
    return function(network(rates), *arguments)

  @functools.wraps(function)
  def call(model, *arguments):
    if model.at_rates is None:
      return fixed(model, *arguments)
    return at_rates(model.at_rates, model.rates, *arguments)

  return call


def once_a_network(function: Callable[..., Any]) -> Callable[..., Any]:
  """Keeps the results of a function of a model that is the same whatever its rates are.

  Args:
    function: whose first argument is a model; all are hashable.

  Returns:
    The function, called with the network at some rates above 0.
  """

  @functools.lru_cache
  def at_half(at_rates, sites, *arguments):
    return function(at_rates(dict.fromkeys(sites, 0.5)), *arguments)

  fixed = functools.lru_cache(function)

  @functools.wraps(function)
  def call(model, *arguments):
    if model.at_rates is None:
      return fixed(model, *arguments)
    return at_half(model.at_rates, tuple(model.rates), *arguments)

  return call


def batch_axes(model: DropoutModel) -> dict[str, int | None]:
  """Returns for each site the axis of its mask that grows with the batch.

  Args:
    model: whose sites to look at.

  Returns:
    {site name: axis}, None where all images share one mask.
  """
  one, two = model.mask_shapes(1), model.mask_shapes(2)
  grows = {
    name: [axis for axis, (a, b) in enumerate(zip(one[name], two[name], strict=True)) if a != b]
    for name in one
  }
  return {name: axes[0] if axes else None for name, axes in grows.items()}


def check_image_shape(image_shape: object) -> tuple[int, int, int]:
  """Returns `image_shape` as a tuple of three positive integers.

  Args:
    image_shape: (height, width, channels).

  Raises:
    InputError: it is not that.
  """
  try:
    shape = tuple(int(n) for n in image_shape)
  except (TypeError, ValueError):
    shape = ()
  if len(shape) != 3 or min(shape) < 1:
    raise InputError(
      f"image_shape is {image_shape!r}; expected three positive integers (height, width,"
      " channels), such as (32, 32, 3)."
    )
  return shape


def check_rate(rate: float, where: str = "dropout_rate") -> float:
  """Returns a dropout rate that lies in [0, 1).

  Args:
    rate: the probability of an entry to be dropped.
    where: what the message calls it.

  Raises:
    InputError: it lies outside, or is no number.
  """
  if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
    raise InputError(
      f"{where} is {rate!r}; expected a number in [0, 1): 0 is no dropout, and 1 would drop"
      " everything."
    )
  return float(rate)
