"""Makes the dropout of an ordinary Flax Linen module explicit.

Flax lets a caller intercept the method calls of a module and of all that it
contains. The adapter intercepts `nn.Dropout`, and the attention weights of
`nn.MultiHeadDotProductAttention`, and puts a mask that it was handed where Flax
would draw one. So a user's module needs no rewriting.
"""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxdia.core.errors import InputError
from jaxdia.core.types import Images, Key, Logits, Masks, Params
from jaxdia.models import discovery
from jaxdia.models.base import DropoutModel, Network, check_image_shape, drop, model_of
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

  def call(self, params: Params, images: Images, hooks: Hooks) -> Logits:
    """Computes logits, with dropout and linear layers intercepted."""
    # A key for a module that makes one for its dropout by itself; nothing is drawn from it.
    with nn.intercept_methods(interceptor(hooks)):
      rngs = dict.fromkeys(("params", "dropout"), jax.random.key(0))
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
  kwargs = _training_kwargs(module) if call_kwargs is None else dict(call_kwargs)
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
  _check_no_other_randomness(network)
  return model


def read_masks(model: DropoutModel, params: Params, images: Images, rngs: Any) -> Masks:
  """Returns the masks that Flax itself draws in a training step, from its own keys.

  With them a gradient that was computed by plain Flax can be scored, or given to the
  well-informed attacker.

  Args:
    model: of `from_flax`.
    params: of the module.
    images: f[B, H, W, C], of the step.
    rngs: as they were given to `module.apply`.

  Returns:
    {site: f[shape]} of zeros and ones.

  Raises:
    InputError: the model is not one of Flax.
  """
  network = model.network
  if not isinstance(network, FlaxNetwork):
    raise InputError(f"{network.name} is no module of Flax; expected a model of from_flax.")
  masks: Masks = {}

  def read(call):
    masks[call.name] = call.draw().astype(call.inputs.dtype)
    return drop(call.inputs, masks[call.name], call.rate)

  with nn.intercept_methods(interceptor(Hooks(read))):
    network.module.apply({"params": params}, images, rngs=rngs, **network.kwargs)
  return masks


def _training_kwargs(module: nn.Module) -> dict[str, bool]:
  parameters = inspect.signature(type(module).__call__).parameters
  return {name: value for name, value in _TRAINING_FLAGS.items() if name in parameters}


def _check_no_other_randomness(network: FlaxNetwork) -> None:
  """Refuses a module that draws other random numbers than the masks of its sites.

  It counts the random numbers in the program of the plain module, loops
  included: dropout inside `nn.scan` draws anew in each turn, which one mask
  cannot stand for, and a network may call `make_rng("dropout")` by itself.
  """
  sites = discovery.discover(network, 2).sites
  images = jax.ShapeDtypeStruct((2, *network.image_shape), jnp.float32)
  program = jax.make_jaxpr(
    lambda params, images, key: network.module.apply(
      {"params": params}, images, rngs={"params": key, "dropout": key}, **network.kwargs
    )
  )(discovery.params_shape(network), images, jax.random.key(0))
  drawn = discovery.count_random_numbers(program.jaxpr)
  explicit = sum(math.prod(shape) for _, shape in sites.values())
  if drawn != explicit:
    raise InputError(
      f"{network.name} draws {drawn} random numbers for 2 images, but its dropout sites"
      f" ({', '.join(sites) or 'none'}) account for {explicit}. What else draws (dropout under"
      " nn.scan or nn.vmap, stochastic depth, noise) cannot be made an explicit mask: unroll"
      " the loop, or turn that part off."
    )
