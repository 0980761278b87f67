"""Makes the dropout of an ordinary Flax Linen module explicit.

Flax lets a caller intercept the method calls of a module and of all that it
contains. The adapter intercepts `nn.Dropout`, and the attention weights of
`nn.MultiHeadDotProductAttention`, and puts a mask that it was handed where Flax
would draw one. So a user's module needs no rewriting.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxdia.core.errors import InputError
from jaxdia.core.types import Images, Key, Logits, Params
from jaxdia.models import discovery
from jaxdia.models.base import DropoutModel, Network, check_image_shape, model_of
from jaxdia.models.flax_interception import interceptor
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
  """

  module: nn.Module
  image_shape: tuple[int, int, int]
  kwargs: Mapping[str, Any]

  @property
  def name(self) -> str:
    """Name of the module's class."""
    return type(self.module).__name__

  def __hash__(self) -> int:
    return hash((type(self.module), self.image_shape))  # attributes may be unhashable

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, FlaxNetwork) or self.image_shape != other.image_shape:
      return False
    try:
      same_module = self.module is other.module or bool(self.module == other.module)
      return same_module and bool(self.kwargs == other.kwargs)
    except (TypeError, ValueError):  # an attribute, such as an array, that does not compare
      return False

  def init(self, key: Key) -> Params:
    """Draws parameters: the module's "params" collection."""
    with nn.intercept_methods(interceptor(Hooks(ignore_sites))):
      variables = self.module.init(
        key, jnp.zeros((1, *self.image_shape), jnp.float32), **self.kwargs
      )
    extra = sorted(set(variables) - {"params"})
    if extra:
      raise InputError(
        f"{self.name} keeps state in the collections {extra} besides 'params' (BatchNorm does),"
        " and from_flax passes 'params' alone, so the module cannot be called. Use a"
        " normalisation without state, such as nn.GroupNorm or nn.LayerNorm."
      )
    if "params" not in variables:
      raise InputError(f"{self.name} has no parameters, so a client has no gradient to send.")
    return nn.unbox(variables["params"])

  def call(self, params: Params, images: Images, hooks: Hooks, rngs: Any = None) -> Logits:
    """Computes logits, with dropout and linear layers intercepted."""
    # A key for a module that makes one for its dropout by itself; nothing is drawn from it.
    rngs = rngs or dict.fromkeys(("params", "dropout"), jax.random.key(0))
    with nn.intercept_methods(interceptor(hooks)):
      logits = self.module.apply({"params": params}, images, rngs=rngs, **self.kwargs)
    return cast(Logits, logits)  # without `mutable` nothing else is returned


def from_flax(
  module: nn.Module,
  image_shape: tuple[int, int, int],
  *,
  call_kwargs: Mapping[str, Any] | None = None,
) -> DropoutModel:
  """Turns a Flax Linen classifier into a `DropoutModel`.

  Sites are named by the path of the module, such as "block_0/Dropout_0"; a
  module that is called more than once gets "#2", "#3", ... for the later calls.
  Dropout of rate 0, and dropout that the module itself makes deterministic, is
  no site.

  Args:
    module: unbound; called as `module(images, **call_kwargs)`, it returns logits
      f[B, num_classes].
    image_shape: (height, width, channels) of the images.
    call_kwargs: arguments of the call in training. By default the argument
      `train`, `training`, `is_training` or `deterministic` is set if
      `__call__` has one.

  Returns:
    The model; its params are the module's "params" collection.

  Raises:
    InputError: the module draws random numbers elsewhere than in dropout sites
      that can be made explicit (stochastic depth, noise, dropout under
      `nn.scan` or `nn.vmap`, a custom attention function), keeps state (batch
      statistics), has all its dropout switched off or a rate outside [0, 1), or
      does not return two logits or more an image. The message names the module.
  """
  if not isinstance(module, nn.Module):
    raise InputError(
      f"from_flax got {type(module).__name__}; expected an instance of flax.linen.Module. A"
      " network of another library can be given as plain functions to from_functions."
    )
  image_shape = check_image_shape(image_shape)
  kwargs = training_kwargs(module) if call_kwargs is None else dict(call_kwargs)
  network = FlaxNetwork(module, image_shape, kwargs)
  try:
    inspect.signature(type(module).__call__).bind(module, None, **kwargs)
  except TypeError as error:
    raise InputError(
      f"{network.name} cannot be called as module(images, **{kwargs}): {error}. Pass call_kwargs"
      " to from_flax with the other arguments of its __call__."
    ) from error
  model = model_of(network)
  inactive = discovery.discover(network, 2).inactive
  if inactive and not model.rates:
    raise InputError(
      f"all dropout of {network.name} ({', '.join(inactive)}) is switched off. Pass call_kwargs to"
      " from_flax with the argument that turns training on, or give it rate 0."
    )
  discovery.check_randomness(network)
  return model


def training_kwargs(module: Any) -> dict[str, bool]:
  """Returns the arguments that turn training on, of those that a module's call takes.

  Args:
    module: of Flax.
  """
  parameters = inspect.signature(type(module).__call__).parameters
  return {name: value for name, value in _TRAINING_FLAGS.items() if name in parameters}
