"""What tokens meet first in a language model: a row for each, dropout, and dense layers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer

from jaxdia.closed_form.span import find_normalisation, inputs_behind
from jaxdia.core.errors import InputError
from jaxdia.core.trees import Path
from jaxdia.core.types import Params
from jaxdia.models.hooks import Hooks
from jaxdia.models.tokens import TokenModel

# Tokens of the vocabulary that are embedded at once.
_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class FirstTokenLayer:
  """The dense layers that tokens meet first, and what they are given.

  A candidate is what dropout is given for a token at a position. Where a normalisation follows
  the dropout, the layers' inputs lie in the span of `scale * mask * candidate`, `scale` and
  `shift`, so candidates are scaled already.

  Attributes:
    model: the network.
    params: its parameters.
    site: of the dropout before these layers; None without.
    paths: of the layers, which have the same inputs.
    width: of the inputs.
    is_normalised: whether a normalisation lies between dropout and the layers.
    scale: f64[D] of the normalisation; ones without.
    shift: f64[D] of the normalisation; zeros without.
  """

  model: TokenModel
  params: Params
  site: str | None
  paths: tuple[Path, ...]
  width: int
  is_normalised: bool
  scale: Float[np.ndarray, " width"]
  shift: Float[np.ndarray, " width"]

  def candidates(self, position: int) -> Float[np.ndarray, "vocabulary width"]:
    """Returns what dropout is given for each token at a position, scaled.

    Args:
      position: from 0.
    """
    return self._given[:, position] * self.scale

  @functools.cached_property
  def _given(self) -> np.ndarray:
    chunks = []
    for start in range(0, self.model.network.vocabulary, _CHUNK):
      tokens = np.minimum(np.arange(start, start + _CHUNK), self.model.network.vocabulary - 1)
      chunks.append(np.asarray(_before(self.model, self.params, jnp.asarray(tokens), self.site)))
    return np.concatenate(chunks)[: self.model.network.vocabulary]

  def inputs(
    self,
    positions: Integer[np.ndarray, " n"],
    tokens: Integer[np.ndarray, " n"],
    masks: Bool[np.ndarray, "n width"],
  ) -> Float[np.ndarray, "n width"]:
    """Returns what the layers are given for tokens under masks.

    Args:
      positions: i[n].
      tokens: i[n].
      masks: b[n, D].
    """
    given = self._given[tokens, positions]
    if self.site is None:
      return given.astype(np.float64)
    rate = float(self.model.model.rates[self.site])
    dropped = given * masks / (1 - rate)
    if not self.is_normalised:
      return dropped.astype(np.float64)
    after = _after(self.model, self.params, jnp.asarray(dropped), self.site, self.paths[0])
    return np.asarray(after, np.float64)


def find_first_layer(model: TokenModel, params: Params) -> FirstTokenLayer:
  """Finds the layers that tokens meet first.

  Args:
    model: the network.
    params: its parameters.

  Raises:
    InputError: it has no dense layer, or something else lies between dropout and it than a
      normalisation.
  """
  length = model.length
  tokens = jnp.arange(2 * length).reshape(2, length) % model.network.vocabulary
  order: list[Any] = []
  inputs: dict[Path, np.ndarray] = {}

  def on_site(call):
    order.append(call.name)
    return call.inputs

  def on_linear(layer, given, outputs, nested):
    if not nested and layer.convolution is None and layer.path not in inputs:
      inputs[layer.path] = np.asarray(given)
      order.append(layer.path)
    return outputs

  model.network.call_tokens(params, tokens, Hooks(on_site, on_linear))
  if not inputs:
    raise InputError(f"{model.network.name} has no dense layer that tells of its inputs.")
  first, given = next(iter(inputs.items()))
  paths = tuple(p for p, x in inputs.items() if x.shape == given.shape and np.array_equal(x, given))
  width = given.shape[-1]
  before = order[: order.index(first)]
  site = before[0] if before else None
  none = FirstTokenLayer(model, params, site, paths, width, False, np.ones(width), np.zeros(width))
  if site is None:
    return none
  shape = (1, length, width)
  if len(before) > 1 or model.model.mask_shapes(1)[site] != shape:
    raise InputError(
      f"between the tokens and the dense layer {'/'.join(first)!r} of {model.network.name} lie the"
      f" dropout sites {before}; expected one with a mask of shape {shape}."
    )

  def after(rows):
    return _after(model, params, rows, site, first)

  is_normalised, scale, shift = find_normalisation(after, width, "/".join(first))
  return dataclasses.replace(none, is_normalised=is_normalised, scale=scale, shift=shift)


@functools.partial(jax.jit, static_argnames="site")
def _before(model: TokenModel, params: Params, tokens: jax.Array, site: str | None) -> jax.Array:
  """Returns what the first dropout, or layer, is given for each token everywhere: f[n, T, D]."""
  seen: list[jax.Array] = []

  def on_site(call):
    if call.name == site:
      seen.append(call.inputs)
    return call.inputs

  def on_linear(layer, inputs, outputs, nested):
    del layer, nested
    seen.append(inputs)
    return outputs

  everywhere = jnp.tile(tokens[:, None], (1, model.length))
  model.network.call_tokens(params, everywhere, Hooks(on_site, on_linear))
  return seen[0]


@functools.partial(jax.jit, static_argnames=("site", "path"))
def _after(model: TokenModel, params: Params, rows: jax.Array, site: str, path: Path) -> jax.Array:
  """Returns what a layer is given if dropout gives these rows, f[n, D]."""
  tokens = jnp.zeros((len(rows), model.length), jnp.int32)

  def call(hooks):
    model.network.call_tokens(params, tokens, hooks)

  return inputs_behind(call, site, path, rows)
