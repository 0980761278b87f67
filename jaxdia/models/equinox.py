"""Makes the dropout of an ordinary Equinox module explicit.

An Equinox module computes a single example, and is mapped over the batch. Attacks need what a
layer does with the whole batch, and masks of it. So layers call their hooks in a function with a
batching rule of its own, in which the arrays of the whole batch are at hand.
"""

import inspect
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import tracers
from jax.custom_batching import custom_vmap

from jaxdia.core.errors import InputError
from jaxdia.core.trees import Path, digest, path_of
from jaxdia.core.types import Images, Params
from jaxdia.models import discovery
from jaxdia.models.base import DropoutModel, check_image_shape, check_rate, model_of
from jaxdia.models.convolutions import PlainConvolution
from jaxdia.models.entries import InstanceNetwork, arrays_of
from jaxdia.models.hooks import Hooks, Linear, SiteCall, SiteNames, check_plain_dropout
from jaxdia.models.layers import Entry

try:
  import equinox as eqx
except ImportError as error:
  raise InputError(
    'Equinox modules need the package equinox. Run pip install "jaxdia[equinox]".'
  ) from error

_LAYERS = (eqx.nn.Dropout, eqx.nn.Linear, eqx.nn.Conv2d)


class EquinoxNetwork(InstanceNetwork):
  """An Equinox module as a network; see `from_equinox`."""

  def __init__(self, module: eqx.Module, image_shape: tuple[int, int, int]):  # noqa: D107
    leaves, self._treedef = jax.tree_util.tree_flatten_with_path(module)
    self._leaves = {".".join(path_of(keys)): leaf for keys, leaf in leaves}
    # A number of NumPy, such as a rate, is no array that training changes.
    arrays = {
      name: np.asarray(x)
      for name, x in self._leaves.items()
      if eqx.is_inexact_array(x) and not isinstance(x, np.generic)
    }
    others = {name: x for name, x in self._leaves.items() if name not in arrays}
    constants = {name: x for name, x in others.items() if eqx.is_array(x)}
    functions = [(name, x) for name, x in others.items() if name not in constants]
    identity = (_hashable((self._treedef, *functions)), digest(constants))
    self._takes_key = "key" in inspect.signature(type(module).__call__).parameters
    name = type(module).__name__
    super().__init__(name, image_shape, arrays, _entries(module, arrays), identity)

  def call(self, params: Params, images: Images, hooks: Hooks, rngs: Any = None) -> Any:
    """Computes logits, with dropout and linear layers intercepted."""
    leaves = self._leaves | arrays_of(self.entries(), params)
    module = jax.tree.unflatten(self._treedef, [leaves[name] for name in self._leaves])
    interception = _EquinoxInterception(hooks)
    layers, structure = jax.tree_util.tree_flatten_with_path(module, is_leaf=_is_layer)
    layers = [interception.around(path_of(keys), layer) for keys, layer in layers]
    module = jax.tree.unflatten(structure, layers)

    def call_one(image, key, token):
      interception.token = token
      return module(image, key=key) if self._takes_key else module(image)

    keys = jax.random.split(jax.random.key(0), len(images)) if rngs is None else rngs
    return jax.vmap(call_one)(images.transpose(0, 3, 1, 2), keys, jnp.zeros(len(images)))


def _is_layer(node: Any) -> bool:
  return isinstance(node, _LAYERS)


class _Layer(eqx.Module):
  """A layer in whose place something else is called; all else of it is as it was."""

  layer: eqx.Module
  function: Callable[..., jax.Array] = eqx.field(static=True)

  def __call__(self, *args, **kwargs):
    return self.function(*args, **kwargs)

  def __getattr__(self, name):
    return getattr(self.layer, name)


class _EquinoxInterception:
  """What the layers of one call tell the hooks through.

  Attributes:
    token: a number of the image that is being computed, by which the mapping over images is told
      from others inside the module.
  """

  def __init__(self, hooks: Hooks):
    self.hooks, self.names, self.outer = hooks, SiteNames(), tracers.current_trace()
    self.token: Any = None

  def around(self, path: Path, layer: Any) -> Any:
    """Returns what takes the place of a layer; what is no layer, as it is."""
    if isinstance(layer, eqx.nn.Dropout):
      return self._dropout(path, layer)
    if type(layer) is eqx.nn.Linear:
      return self._linear(Linear(path, None), layer)
    if type(layer) is eqx.nn.Conv2d and layer.padding_mode == "ZEROS":
      return self._linear(Linear(path, _alone(layer)), layer)
    return layer

  def _dropout(self, path: Path, layer: eqx.nn.Dropout) -> Any:
    where = "/".join(path) or "Dropout"
    check_plain_dropout(where, layer, eqx.nn.Dropout, "eqx.nn.Dropout")
    if layer.p == 0:
      return layer
    rate = check_rate(layer.p, f"the rate of the dropout {where!r}")

    def call(x, *, key=None, inference=None, deterministic=None):
      told = (deterministic, inference, layer.inference)
      if next(flag for flag in told if flag is not None):
        self.hooks.on_inactive(where)
        return x
      if key is None:
        raise InputError(
          f"the dropout {where!r} is given no key. Let __call__ of the module take an argument"
          " `key`, and hand it on."
        )
      own_shape = x.shape

      def on_batch(inputs, keys, own):
        if tracers.current_trace() != self.outer:
          raise InputError(
            f"the dropout {where!r} is inside a transformation (scan, jit, checkpoint), in which"
            " one mask cannot stand for all turns. Unroll the loop, or leave the transformation"
            " out."
          )
        mapped = zip(inputs.shape, own, strict=False)
        shape = (*(n if is_own else 1 for n, is_own in mapped), *own_shape)

        def draw():
          one = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, own_shape))
          return one(keys.reshape(-1)).reshape(shape)

        return self.hooks.on_site(SiteCall(self.names(where), rate, shape, inputs, draw))

      def hook(keys, own, x):
        return on_batch(x, keys, own)

      if not jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
      return _with_batch(hook)(self.token, key, x)

    return _Layer(layer, call)

  def _linear(self, linear: Linear, layer: Any) -> Any:
    on_linear = self.hooks.on_linear
    if on_linear is None:
      return layer

    def call(x, *, key=None):
      del key
      outputs = layer(x)
      if outputs.ndim == 0:
        return outputs

      def hook(keys, own, inputs, outputs):
        del keys, own
        nested = tracers.current_trace() != self.outer
        if linear.convolution is not None and outputs.ndim != 4:
          return outputs
        return on_linear(linear, inputs, outputs, nested)

      return _with_batch(hook)(self.token, self.token, x, outputs)

    return _Layer(layer, call)


def _with_batch(hook: Callable[..., jax.Array], own: tuple[bool, ...] = ()) -> Any:
  """Returns a function of one image that calls a hook with the arrays of all.

  Args:
    hook: `hook(keys, own, *arrays)`, to which arrays have the axis of images first, and then
      those of other maps inside the module; its result is like the last of them.
    own: for each axis of such a map so far, whether each of its places has a key of its own.

  Returns:
    `function(token, key, *arrays)`.
  """

  @custom_vmap
  def of_one(token, key, *arrays):
    del token, key
    return arrays[-1]

  @of_one.def_vmap
  def of_many(size, mapped, token, key, *arrays):
    is_images, has_keys, *are_mapped = mapped
    arrays = [
      x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
      for x, is_mapped in zip(arrays, are_mapped, strict=True)
    ]
    flags = (has_keys, *own)
    if is_images:
      return hook(key, flags, *arrays), True
    return _with_batch(hook, flags)(token, key, *arrays), True

  return of_one


def _alone(layer: eqx.nn.Conv2d) -> PlainConvolution:
  """Returns a convolution by itself."""
  padding = layer.padding
  padding = padding if isinstance(padding, str) else tuple(map(tuple, padding))
  return PlainConvolution(
    tuple(layer.stride), padding, (1, 1), tuple(layer.dilation), layer.groups, "NCHW"
  )


def _entries(module: eqx.Module, arrays: dict[str, np.ndarray]) -> dict[str, Entry]:
  """Returns where the arrays lie among the params: kernels as Flax has them."""
  kinds = (eqx.nn.Linear, eqx.nn.Conv)
  nodes = jax.tree_util.tree_leaves_with_path(module, is_leaf=lambda x: isinstance(x, kinds))
  owners = {path_of(keys): node for keys, node in nodes if isinstance(node, kinds)}
  entries = {}
  for name, array in arrays.items():
    (*path, last), axes = name.split("."), None
    if tuple(path) in owners and last == "weight":
      last, axes = "kernel", (*range(2, array.ndim), 1, 0)
    elif tuple(path) in owners and array.ndim > 1:  # biases of convolutions are [outputs, 1, 1]
      axes = (*range(1, array.ndim), 0)
    entries[name] = Entry((*path, last), axes)
  return entries


def _hashable(value: Any) -> Hashable:
  """Returns a value, or what equals nothing else if it does not compare."""
  try:
    hash(value)
  except TypeError:
    return object()
  return value


def from_equinox(module: eqx.Module, image_shape: tuple[int, int, int]) -> DropoutModel:
  """Turns an Equinox classifier into a `DropoutModel`.

  The module is taken as it is, in the mode that it is in, as `eqx.nn.inference_mode` changes it.
  Sites are named by the path of the module, such as "layers/2".

  Args:
    module: called as `module(image)` with an image f[C, H, W], it returns logits f[num_classes];
      with an argument `key` if `__call__` takes one.
    image_shape: (height, width, channels) of the images; they are turned for the module.

  Returns:
    The model. Its `init` returns the module's own weights, whatever the key; these are its arrays
    of floating-point numbers. `model.network.entries()` tells where each array lies.

  Raises:
    InputError: the module keeps state, as eqx.nn.BatchNorm does, draws random numbers elsewhere
      than in dropout, has dropout inside a scan, has all its dropout switched off, or does not
      return two logits or more.
  """
  if not isinstance(module, eqx.Module) or not callable(module):
    raise InputError(
      f"from_equinox got {type(module).__name__}; expected an instance of equinox.Module that can"
      " be called."
    )
  states = jax.tree.leaves(module, is_leaf=lambda node: isinstance(node, eqx.nn.StateIndex))
  if any(isinstance(node, eqx.nn.StateIndex) for node in states):
    raise InputError(
      f"{type(module).__name__} keeps state (eqx.nn.BatchNorm does), which is handed in and out of"
      " its call, and from_equinox hands in an image alone. Use a normalisation without state,"
      " such as eqx.nn.GroupNorm or eqx.nn.LayerNorm."
    )
  network = EquinoxNetwork(module, check_image_shape(image_shape))
  with discovery.naming_failures(network):
    model = model_of(network)
    mend = "Switch it on by eqx.nn.inference_mode(module, value=False)"
    discovery.check_is_on(network, discovery.discover(network, 2).inactive, mend)
    discovery.check_randomness(network)
  return model
