"""Makes the dropout of an ordinary Flax Linen module explicit.

Flax lets a caller intercept the method calls of a module and of all that it
contains. The adapter intercepts `nn.Dropout`, and the attention weights of
`nn.MultiHeadDotProductAttention`, and puts a mask that it was handed where Flax
would draw one. So a user's module needs no rewriting.
"""

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Shaped

from jaxdia.core.errors import InputError
from jaxdia.core.trees import Constants, leaves_by_name, leaves_by_path, replaced, with_leaves
from jaxdia.core.types import Array, Images, Key, NamedArrays, Params
from jaxdia.models import discovery
from jaxdia.models.base import DropoutModel, Network, check_image_shape, model_of
from jaxdia.models.flax_interception import interceptor
from jaxdia.models.flax_variables import fit_collections
from jaxdia.models.hooks import Hooks, ignore_sites

# How modules name the argument of __call__ that turns dropout on.
_TRAINING_FLAGS = {"train": True, "training": True, "is_training": True, "deterministic": False}


@dataclasses.dataclass(frozen=True, eq=False)
class FlaxNetwork(Network):
  """A Flax Linen module as a network.

  Attributes:
    module: unbound.
    image_shape: (height, width, channels).
    kwargs: of its call.
    collections: its variables besides "params", such as running averages.
    input_shape: of what it is called with for one image: of a sequence (frames, features), of a
      row of a table (features,); None for images.
  """

  module: nn.Module
  image_shape: tuple[int, int, int]
  kwargs: Mapping[str, Any]
  collections: Constants
  input_shape: tuple[int, ...] | None = None

  @property
  def name(self) -> str:
    """Name of the module's class."""
    return type(self.module).__name__

  def __hash__(self) -> int:
    # Attributes of the module may be unhashable.
    return hash((type(self.module), self.image_shape, self.collections, self.input_shape))

  def __eq__(self, other: object) -> bool:
    if type(other) is not type(self) or self.image_shape != other.image_shape:
      return False
    if (self.collections, self.input_shape) != (other.collections, other.input_shape):
      return False
    try:
      same_module = self.module is other.module or bool(self.module == other.module)
      return same_module and bool(self.kwargs == other.kwargs)
    except (TypeError, ValueError):  # an attribute, such as an array, that does not compare
      return False

  def init_variables(self, key: Key) -> dict[str, Any]:
    """Draws all collections that the module reads in a step.

    Args:
      key: random key.

    Raises:
      InputError: it has no parameters.
    """
    variables = _init(self, key)
    if "params" not in variables:
      raise InputError(f"{self.name} has no parameters, so a client has no gradient to send.")
    return {name: nn.unbox(tree) for name, tree in variables.items() if name != "intermediates"}

  def init(self, key: Key) -> Params:
    """Draws parameters: the module's "params" collection."""
    return self.init_variables(key)["params"]

  def constants(self) -> tuple[str, ...]:
    """Returns the names of the variables that no gradient changes."""
    return tuple(leaves_by_name(self.collections.tree))

  def with_constants(self, arrays: NamedArrays) -> Network:
    """Returns the network with other collections, such as running averages."""
    tree = self.collections.tree
    given = replaced(leaves_by_name(tree), arrays)
    leaves = {path: given[".".join(path)] for path in leaves_by_path(tree)}
    return dataclasses.replace(self, collections=Constants(with_leaves(tree, leaves)))

  def evaluation(self) -> Network:
    """Returns the network with the argument that turns training on turned off."""
    off = {name: not on for name, on in _TRAINING_FLAGS.items() if name in self.kwargs}
    return dataclasses.replace(self, kwargs={**self.kwargs, **off})

  def call(self, params: Params, images: Images, hooks: Hooks, rngs: Any = None) -> Any:
    """Computes logits, with dropout and linear layers intercepted."""
    return self._step(params, images, hooks, self.collections.tree, rngs)[0]

  def constants_after(
    self, params: Params, images: Images, hooks: Hooks, before: Mapping[str, Shaped[Array, "..."]]
  ) -> dict[str, Shaped[Array, "..."]]:
    """Returns what a step makes of the other collections, such as running averages, by name."""
    others = self.collections.tree
    given = {
      path: before.get(".".join(path), leaf) for path, leaf in leaves_by_path(others).items()
    }
    return leaves_by_name(self._step(params, images, hooks, with_leaves(others, given), None)[1])

  def _example(self):
    """Returns what the module is called with to draw its parameters."""
    return self._given(jnp.zeros((1, *self.image_shape), jnp.float32))

  def _given(self, images):
    """Returns images as the module takes them."""
    shape = self.input_shape
    return images if shape is None else images.reshape(len(images), *shape)

  def _step(self, params, images, hooks, others, rngs):
    """Returns logits, and the other collections after the step."""
    images = self._given(images)
    # A key for a module that makes one for its dropout by itself; nothing is drawn from it.
    rngs = rngs or dict.fromkeys(("params", "dropout"), jax.random.key(0))
    with nn.intercept_methods(interceptor(hooks)):
      options = {"rngs": rngs, **self.kwargs}
      if not others:
        return self.module.apply({"params": params}, images, **options), {}
      # In training a module writes what follows from the step, such as new averages.
      variables = {"params": params, **others}
      return self.module.apply(variables, images, mutable=list(others), **options)


@functools.partial(jax.jit, static_argnums=0)
def _init(network: FlaxNetwork, key: Key) -> Any:
  """Draws variables in one program, which compiles in half the time of its operations alone."""
  with nn.intercept_methods(interceptor(Hooks(ignore_sites))):
    return network.module.init(key, network._example(), **network.kwargs)


def from_flax(
  module: nn.Module,
  image_shape: tuple[int, ...],
  *,
  variables: Mapping[str, Any] | None = None,
  call_kwargs: Mapping[str, Any] | None = None,
) -> DropoutModel:
  """Turns a Flax Linen classifier into a `DropoutModel`.

  Sites are named by the path of the module, such as "block_0/Dropout_0"; a
  module that is called more than once gets "#2", "#3", ... for the later calls.
  Dropout of rate 0, and dropout that the module itself makes deterministic, is
  no site. A layer that has a type of its own computes in float64 where it is given that.

  What the call in training does with batch statistics is the client's mode, with and without
  dropout: with `nn.BatchNorm(use_running_average=not train)` the images of a batch are normalised
  by their own mean and variance, with `use_running_average=True` by the averages in `variables`.

  Args:
    module: unbound; called as `module(images, **call_kwargs)`, it returns logits
      f[B, num_classes].
    image_shape: (height, width, channels) of the images. A module of sequences, called with
      f[B, frames, features], has (frames, features), one of tables, called with f[B, features],
      has (features,); to an attack they are images of (frames, 1, features) or (1, 1, features).
    variables: the module's collections besides "params", such as {"batch_stats": ...}, as the
      client has them before the step; by default as `module.init` makes them. They are constants
      of the model, so they should be small.
    call_kwargs: arguments of the call in training. By default the argument
      `train`, `training`, `is_training` or `deterministic` is set if
      `__call__` has one. `{"train": False}` is a client in evaluation mode: dropout is off, and
      BatchNorm takes its averages.

  Returns:
    The model; its params are the module's "params" collection.

  Raises:
    InputError: the module draws random numbers elsewhere than in dropout sites
      that can be made explicit (stochastic depth, noise, dropout under
      `nn.scan` or `nn.vmap`, a custom attention function), has all its dropout switched off or a
      rate outside [0, 1), or does not return two logits or more an image; or variables are of
      other collections or shapes than its own, or are missing where they are drawn at random. The
      message names the module.
  """
  if not isinstance(module, nn.Module):
    raise InputError(
      f"from_flax got {type(module).__name__}; expected an instance of flax.linen.Module. A"
      " network of another library can be given as plain functions to from_functions."
    )
  shape, input_shape = _shapes(image_shape)
  kwargs = training_kwargs(module) if call_kwargs is None else dict(call_kwargs)
  network = FlaxNetwork(module, shape, kwargs, Constants({}), input_shape)
  try:
    inspect.signature(type(module).__call__).bind(module, None, **kwargs)
  except TypeError as error:
    raise InputError(
      f"{network.name} cannot be called as module(images, **{kwargs}): {error}. Pass call_kwargs"
      " to from_flax with the other arguments of its __call__."
    ) from error
  with discovery.naming_failures(network):
    network = dataclasses.replace(network, collections=fit_collections(network, variables))
    model = model_of(network)
    if not any(kwargs.get(name, on) != on for name, on in _TRAINING_FLAGS.items()):  # not meant so
      mend = "Pass call_kwargs to from_flax with the argument that turns training on"
      discovery.check_is_on(network, discovery.discover(network, 2).inactive, mend)
    discovery.check_randomness(network)
  return model


def _shapes(shape: Any) -> tuple[tuple[int, int, int], tuple[int, ...] | None]:
  """Returns the shape of an image, and that of what a module takes if it is another."""
  if not isinstance(shape, (tuple, list)) or len(shape) not in (1, 2):
    return check_image_shape(shape), None
  frames, features = (1, *shape)[-2:]
  image_shape = check_image_shape((frames, 1, features))
  return image_shape, (image_shape[0], image_shape[2])[-len(shape) :]


def training_kwargs(module: Any) -> dict[str, bool]:
  """Returns the arguments that turn training on, of those that a module's call takes.

  Args:
    module: of Flax.
  """
  parameters = inspect.signature(type(module).__call__).parameters
  return {name: value for name, value in _TRAINING_FLAGS.items() if name in parameters}
