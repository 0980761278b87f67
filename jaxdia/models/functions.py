"""A network that is written as plain functions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core
from jaxtyping import Float

from jaxdia.core.errors import InputError, first_line
from jaxdia.core.trees import leaves_by_path
from jaxdia.core.types import Array, Images, Key, Logits, Params
from jaxdia.models import discovery
from jaxdia.models.base import DropoutModel, Network, check_image_shape, model_of
from jaxdia.models.hooks import Hooks, SiteCall

# drop(site, activations, mask_shape=None) -> activations
Drop = Callable[..., Float[Array, "..."]]


@dataclasses.dataclass(frozen=True)
class FunctionNetwork(Network):
  """Two functions as a network; see `from_functions`."""

  initialize: Callable[[Key], Params]
  function: Callable[[Params, Drop, Images], Logits]
  image_shape: tuple[int, int, int]

  @property
  def name(self) -> str:
    """Name of the function that computes the logits."""
    return getattr(self.function, "__name__", type(self.function).__name__)

  def init(self, key: Key) -> Params:
    """Draws parameters."""
    return self.initialize(key)

  def call(self, params: Params, images: Images, hooks: Hooks, rngs: Any = None) -> Any:
    """Computes logits, with dropout as the hooks make it."""
    del rngs  # nothing is drawn
    met = set()

    def drop(site: str, inputs: jax.Array, mask_shape: tuple[int, ...] | None = None) -> jax.Array:
      if not isinstance(site, str):
        raise InputError(
          f"{self.name} calls drop with {type(site).__name__} as its site; expected"
          " drop(site, activations) with the name of the site first."
        )
      if site in met:
        raise InputError(
          f"{self.name} drops at the site {site!r} twice; give each call a name of its own, since"
          " each draws a mask of its own."
        )
      met.add(site)
      shape = tuple(mask_shape or inputs.shape)
      if len(shape) != inputs.ndim or any(
        n not in (1, m) for n, m in zip(shape, inputs.shape, strict=True)
      ):
        raise InputError(
          f"the mask_shape of site {site!r} is {shape}; expected {inputs.shape} as the activations,"
          " with 1 along the axes that share an entry."
        )
      return hooks.on_site(SiteCall(site, None, shape, inputs))

    return self.function(params, drop, images)


def from_functions(
  init: Callable[[Key], Params],
  apply: Callable[[Params, Drop, Images], Logits],
  image_shape: tuple[int, int, int],
  rates: Mapping[str, float],
) -> DropoutModel:
  """Turns plain functions, of whatever library, into a `DropoutModel`.

  Its dense layers are not known, so gradients are compared whole. The first and the last one are
  found by trial: of the closed forms those of a single image behind a first layer with a bias and
  of patches apply, and labels are recovered.

  Args:
    init: `init(key) -> params`, a pytree of arrays.
    apply: `apply(params, drop, images) -> f[B, num_classes]`; where the network has dropout it
      calls `drop(site, activations)`, which returns activations of the same shape. With
      `mask_shape` a mask may be shared along axes where that is 1.
    image_shape: (height, width, channels) of the images.
    rates: {site: probability of an entry to be dropped}, one for each site that `apply` names.

  Returns:
    The model. Models of the same functions share compiled programs, whatever their rates.

  Raises:
    InputError: a function fails, sites and rates do not match, a rate is out of range, what `drop`
      returns is not used, or the functions draw random numbers by themselves.
  """
  network = FunctionNetwork(init, apply, check_image_shape(image_shape))
  if not isinstance(rates, Mapping):
    raise InputError(
      f"rates is {rates!r}; expected a dict of the rate of each site, such as {{'hidden': 0.5}}."
    )
  _check_params(network)
  try:
    model = model_of(network, rates)
  except InputError:
    raise
  except Exception as error:  # of whatever the user's function does
    raise _failed("apply(params, drop, images)", error) from error
  _check_masks_are_used(model)
  discovery.check_no_randomness(network, "Leave dropout to the function `drop` that it is given.")
  return model


def _failed(function: str, error: Exception) -> InputError:
  return InputError(
    f"{function} ended in a {type(error).__name__}: {first_line(error)}. It was called as JAX"
    " traces it, without values; expected arrays of JAX throughout, and arguments in this order."
  )


def _check_params(network: FunctionNetwork) -> None:
  """Refuses an `init` that gives no tree of arrays of floats."""
  try:
    shapes = jax.eval_shape(network.init, jax.random.key(0))
  except Exception as error:  # of whatever the user's function does
    raise _failed("init(key)", error) from error
  leaves = leaves_by_path(shapes)
  if not leaves:
    raise InputError("init(key) returns no array at all; expected a pytree of arrays of floats.")
  for path, leaf in leaves.items():
    if not jnp.issubdtype(leaf.dtype, np.floating):
      raise InputError(
        f"the leaf {'/'.join(path)!r} that init(key) returns is {leaf.dtype}; expected floats, by"
        " which the loss has a gradient."
      )


def _check_masks_are_used(model: DropoutModel) -> None:
  """Refuses a network whose logits do not depend on one of its masks."""
  shapes = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in model.mask_shapes(2).items()
  }
  images = jax.ShapeDtypeStruct((2, *model.image_shape), jnp.float32)
  params = discovery.params_shape(model.network)
  traced = jax.make_jaxpr(lambda masks: model.apply(_zeros(params), masks, _zeros(images)))(shapes)
  used = {variable for variable in traced.jaxpr.outvars if isinstance(variable, jex_core.Var)}
  for equation in reversed(traced.jaxpr.eqns):
    if used & set(equation.outvars):
      used |= {variable for variable in equation.invars if isinstance(variable, jex_core.Var)}
  unused = [
    name for name, v in zip(sorted(shapes), traced.jaxpr.invars, strict=True) if v not in used
  ]
  if unused:
    raise InputError(
      f"the logits of {model.network.name} do not depend on the mask of site {unused[0]!r};"
      " expected that it goes on with what drop returns."
    )


def _zeros(shapes: Any) -> Any:
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
