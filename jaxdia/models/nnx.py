"""Makes the dropout of an ordinary Flax NNX module explicit.

An NNX module is a graph of objects. Each call puts a copy of it together, in which dropout and
linear layers are of classes that tell the hooks; so a user's module needs no rewriting, and is
never changed.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import tracers
from flax.nnx.nn.attention import dot_product_attention_weights
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Shaped

from jaxdia.core.errors import InputError
from jaxdia.core.trees import digest, leaves_by_name, replaced
from jaxdia.core.types import Array, Images, NamedArrays, Params
from jaxdia.models import discovery
from jaxdia.models.base import DropoutModel, Network, check_image_shape, check_rate, model_of
from jaxdia.models.entries import InstanceNetwork, arrays_of
from jaxdia.models.flax import training_kwargs
from jaxdia.models.flax_interception import plain_convolution
from jaxdia.models.hooks import Hooks, Linear, SiteCall, SiteNames, check_plain_dropout
from jaxdia.models.layers import Entry


class NNXNetwork(InstanceNetwork):
  """A Flax NNX module as a network; see `from_nnx`."""

  def __init__(  # noqa: D107
    self, module: nnx.Module, image_shape: tuple[int, int, int], kwargs: Mapping[str, Any]
  ):
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    rest = jax.tree.map(lambda x: x, rest)  # variables of its own: the module's may change
    flat = _by_name(params)
    arrays = {name: np.asarray(x) for name, x in flat.items()}
    # Canonical as they are: kernels are [..., inputs, outputs].
    entries = {name: Entry(tuple(name.split("."))) for name in flat}
    self._graph, self._params, self._kwargs = graph, params, dict(kwargs)
    # Keys of random numbers are no part of what a network computes, as nothing is drawn.
    random, self._rest = nnx.split_state(rest, nnx.RngState, ...)
    self._random = random
    identity = (graph, digest(_by_name(self._rest)), tuple(sorted(kwargs.items())))
    super().__init__(type(module).__name__, image_shape, arrays, entries, identity)

  def constants(self) -> tuple[str, ...]:
    """Returns the names of the module's other variables, such as running averages."""
    return tuple(_by_name(self._rest))

  def with_constants(self, arrays: NamedArrays) -> Network:
    """Returns the network with other variables that are no params, such as running averages."""
    leaves = map(jnp.asarray, replaced(_by_name(self._rest), arrays).values())
    rest = jax.tree.unflatten(jax.tree.structure(self._rest), list(leaves))
    return self.in_mode(("constants", digest(_by_name(rest))), _rest=rest)

  def evaluation(self) -> Network:
    """Returns the network in evaluation mode, in which BatchNorm takes its averages."""
    parts = jax.tree.map(lambda x: x, (self._params, self._random, self._rest))
    module = nnx.merge(self._graph, *parts)
    module.eval()
    kwargs = {name: not on for name, on in training_kwargs(module).items() if name in self._kwargs}
    graph = nnx.split(module, nnx.Param, ...)[0]
    return self.in_mode("evaluation", _graph=graph, _kwargs={**self._kwargs, **kwargs})

  def call(self, params: Params, images: Images, hooks: Hooks, rngs: Any = None) -> Any:
    """Computes logits, with dropout and linear layers intercepted."""
    return self._step(params, images, hooks, self._rest, rngs)[0]

  def constants_after(
    self, params: Params, images: Images, hooks: Hooks, before: Mapping[str, Shaped[Array, "..."]]
  ) -> dict[str, Shaped[Array, "..."]]:
    """Returns what a step makes of the other variables, such as running averages, by name."""
    own, structure = _by_name(self._rest), jax.tree.structure(self._rest)
    rest = jax.tree.unflatten(structure, [before.get(name, own[name]) for name in own])
    module = self._step(params, images, hooks, rest, None)[1]
    others = nnx.Not(nnx.Any(nnx.Param, nnx.RngState))
    return _by_name(nnx.state(module, others))

  def _step(self, params, images, hooks, rest, rngs):
    """Returns logits, and the module after the step."""
    arrays = arrays_of(self.entries(), params)
    structure = jax.tree.structure(self._params)
    state = jax.tree.unflatten(structure, [arrays[name] for name in self.arrays])
    random = self._random
    if isinstance(rngs, nnx.Module):
      random = nnx.state(rngs, nnx.RngState)
    # What a call changes, such as running averages and counts of random numbers, must not be seen.
    module = nnx.merge(self._graph, state, *jax.tree.map(lambda x: x, (random, rest)))
    interception = _NNXInterception(hooks)
    for path, node in list(nnx.iter_graph(module)):
      if images.dtype == jnp.float64:
        _widen(node)
      interception.put_into(node, tuple(map(str, path)))
    kwargs = dict(self._kwargs)
    if "rngs" in inspect.signature(type(module).__call__).parameters:
      kwargs.setdefault("rngs", rngs if isinstance(rngs, nnx.Rngs) else nnx.Rngs(0))
    return module(images, **kwargs), module


def _by_name(state: nnx.State) -> dict[str, Any]:
  return leaves_by_name(nnx.to_pure_dict(state))


class _NNXInterception:
  """What the modules of one call tell the hooks through."""

  def __init__(self, hooks: Hooks):
    self.hooks, self.names, self.outer = hooks, SiteNames(), tracers.current_trace()

  def put_into(self, node: Any, path: tuple[str, ...]) -> None:
    """Changes a module of the graph, which belongs to this call alone."""
    where = "/".join(path) or type(node).__name__
    if isinstance(node, nnx.Dropout):
      check_plain_dropout(where, node, nnx.Dropout, "nnx.Dropout")
      node.__class__ = _Dropout
    elif isinstance(node, nnx.MultiHeadAttention) and node.dropout_rate:
      if node.attention_fn is not nnx.dot_product_attention:
        raise InputError(
          f"the attention {where!r} has a custom attention_fn, so the masks of its dropout cannot"
          " be made explicit. Use nnx.dot_product_attention, or dropout_rate=0 there."
        )
      node.attention_fn = _Attention(self, where, node.dropout_rate)
    elif type(node) is nnx.Linear and _contracted_axes(node):
      node.__class__ = _Linear
    elif type(node) is nnx.LinearGeneral and _contracted_axes(node):
      node.__class__ = _LinearGeneral
    elif type(node) is nnx.Conv and _is_plain(node) and plain_convolution(node):
      node.__class__ = _Conv
    else:
      return
    vars(node).update(_interception=self, _where=path)

  def drop(
    self,
    where: str,
    rate: float,
    shape: Sequence[int],
    inputs: Shaped[Array, "..."],
    draw: Callable[[], Shaped[Array, "..."]],
  ) -> Shaped[Array, "..."]:
    """Calls the hook of a site."""
    rate = check_rate(rate, f"the rate of the dropout {where!r}")
    return self.hooks.on_site(SiteCall(self.names(where), rate, tuple(shape), inputs, draw))

  def dense(
    self, node: Any, inputs: Shaped[Array, "..."], outputs: Shaped[Array, "..."]
  ) -> Shaped[Array, "..."]:
    """Calls the hook of a dense layer."""
    contracted = _contracted_axes(node)
    if contracted > inputs.ndim:
      return outputs
    rows = inputs.shape[: inputs.ndim - contracted]
    flat = self.linear(node, None, inputs.reshape(*rows, -1), outputs.reshape(*rows, -1))
    return flat.reshape(outputs.shape)

  def linear(
    self,
    node: Any,
    convolution: Any,
    inputs: Shaped[Array, "..."],
    outputs: Shaped[Array, "..."],
  ) -> Shaped[Array, "..."]:
    """Calls the hook of a linear layer."""
    if self.hooks.on_linear is None or (convolution is not None and outputs.ndim != 4):
      return outputs
    nested = tracers.current_trace() != self.outer
    inputs = inputs.astype(outputs.dtype)  # in which the layer has computed
    return self.hooks.on_linear(Linear(node._where, convolution), inputs, outputs, nested)


class _Dropout(nnx.Dropout):
  """Dropout that leaves the mask to a hook."""

  _interception: _NNXInterception
  _where: tuple[str, ...]

  def __call__(self, inputs, *, deterministic=None, rngs=None):
    where = "/".join(self._where) or "Dropout"
    off = self.deterministic if deterministic is None else deterministic
    if off is None:
      raise InputError(
        f"the dropout {where!r} is not told whether it is on. Give it deterministic=False, or pass"
        " call_kwargs to from_nnx with the argument that turns training on."
      )
    if self.rate == 0:
      return inputs
    if off:
      self._interception.hooks.on_inactive(where)
      return inputs
    shape = list(inputs.shape)
    for axis in self.broadcast_dims:
      shape[axis] = 1

    def draw():
      ones = jnp.ones_like(inputs)
      drawn = nnx.Dropout.__call__(self, ones, deterministic=False, rngs=rngs)
      return drawn[tuple(slice(n) for n in shape)] != 0

    return self._interception.drop(where, self.rate, shape, inputs, draw)


class _Attention:
  """`nnx.dot_product_attention` that leaves the mask to a hook."""

  def __init__(self, interception: _NNXInterception, where: str, rate: float):
    self.interception, self.where, self.rate = interception, where, rate

  def __call__(self, query, key, value, *, deterministic, **kwargs):
    drawn_with = {
      name: kwargs.pop(name) for name in ("dropout_rng", "dropout_rate", "broadcast_dropout")
    }
    weights = dot_product_attention_weights(query, key, deterministic=True, **kwargs)
    if deterministic:
      self.interception.hooks.on_inactive(self.where)
    else:
      shape = weights.shape
      if drawn_with["broadcast_dropout"]:  # one mask for all samples and heads
        shape = (1,) * (weights.ndim - 2) + shape[-2:]

      def draw():
        drawn = dot_product_attention_weights(
          jnp.zeros_like(query),  # so that no weight is zero that was not dropped
          key,
          deterministic=False,
          **drawn_with,
        )
        return drawn[tuple(slice(n) for n in shape)] != 0

      weights = self.interception.drop(self.where, self.rate, shape, weights, draw)
    # Heads of queries may share those of values.
    value = jnp.repeat(value, weights.shape[-3] // value.shape[-2], axis=-2)
    return jnp.einsum("...hqk,...khd->...qhd", weights, value, precision=kwargs.get("precision"))


class _Linear(nnx.Linear):
  """A dense layer that tells a hook."""

  _interception: _NNXInterception

  def __call__(self, inputs, *args, **kwargs):
    outputs = nnx.Linear.__call__(self, inputs, *args, **kwargs)
    return self._interception.dense(self, inputs, outputs)


class _LinearGeneral(nnx.LinearGeneral):
  """A dense layer over several axes that tells a hook."""

  _interception: _NNXInterception

  def __call__(self, inputs, *args, **kwargs):
    outputs = nnx.LinearGeneral.__call__(self, inputs, *args, **kwargs)
    return self._interception.dense(self, inputs, outputs)


class _Conv(nnx.Conv):
  """A convolution that tells a hook."""

  _interception: _NNXInterception

  def __call__(self, inputs, *args, **kwargs):
    outputs = nnx.Conv.__call__(self, inputs, *args, **kwargs)
    return self._interception.linear(self, plain_convolution(self), inputs, outputs)


def _is_plain(node: Any) -> bool:
  """Returns whether a layer computes with its kernel as it is, in whatever type."""
  promote = getattr(node, "promote_dtype", promote_dtype)
  return promote is promote_dtype and getattr(node, "preferred_element_type", None) is None


def _contracted_axes(node: Any) -> int:
  """Returns over how many axes, the last ones, a dense layer sums; 0 for what is no plain one."""
  if not _is_plain(node) or node.dot_general not in (None, jax.lax.dot_general):
    return 0
  if not isinstance(node, nnx.LinearGeneral):
    return 1
  count = len(node.axis)
  plain = node.dot_general_cls is None and not node.batch_axis
  return count if plain and node.axis == tuple(range(-count, 0)) else 0


def _widen(node: Any) -> None:
  """Lets a layer of Flax that has a type of its own compute in float64, as it is given that."""
  is_layer = issubclass(type(node), nnx.Module) and type(node).__module__.startswith("flax.")
  if is_layer and getattr(node, "dtype", None) is not None:
    node.dtype = None


def from_nnx(
  module: nnx.Module,
  image_shape: tuple[int, int, int],
  *,
  call_kwargs: Mapping[str, Any] | None = None,
) -> DropoutModel:
  """Turns a Flax NNX classifier into a `DropoutModel`.

  The module is taken as it is, in the mode that it is in (`module.train()`), and stays untouched.
  Sites are named by the path of the module, such as "blocks/0/dropout". A layer that has a type of
  its own computes in float64 where the images are of that.

  Args:
    module: called as `module(images, **call_kwargs)`, it returns logits f[B, num_classes].
    image_shape: (height, width, channels) of the images.
    call_kwargs: arguments of the call in training. By default the argument `train`, `training`,
      `is_training` or `deterministic` is set if `__call__` has one, and `rngs`.

  Returns:
    The model. Its `init` returns the module's own weights, whatever the key. What is no
    `nnx.Param`, such as running averages, is constant.

  Raises:
    InputError: as of `from_flax`.
  """
  if not isinstance(module, nnx.Module):
    raise InputError(f"from_nnx got {type(module).__name__}; expected an instance of nnx.Module.")
  image_shape = check_image_shape(image_shape)
  if call_kwargs is None:
    call_kwargs = training_kwargs(module)
  network = NNXNetwork(module, image_shape, call_kwargs)
  try:
    inspect.signature(type(module).__call__).bind_partial(module, None, **call_kwargs)
  except TypeError as error:
    raise InputError(
      f"{network.name} cannot be called as module(images, **{dict(call_kwargs)}): {error}. Pass"
      " call_kwargs to from_nnx with the other arguments of its __call__."
    ) from error
  with discovery.naming_failures(network):
    model = model_of(network)
    mend = "Call module.train() before, pass call_kwargs with the argument that turns training on"
    discovery.check_is_on(network, discovery.discover(network, 2).inactive, mend)
    discovery.check_randomness(network)
  return model
