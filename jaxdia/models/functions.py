"""A network that is written as plain functions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxdia.core.errors import InputError
from jaxdia.core.types import Images, Key, Logits, Params
from jaxdia.models import discovery
from jaxdia.models.base import DropoutModel, Network, check_image_shape, model_of
from jaxdia.models.hooks import Hooks, SiteCall

# drop(site, activations, mask_shape=None) -> activations
Drop = Callable[..., jax.Array]


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
      if site in met:
        raise InputError(
          f"{self.name} drops at the site {site!r} twice; give each call a name of its own, since"
          " each draws a mask of its own."
        )
      met.add(site)
      return hooks.on_site(SiteCall(site, None, tuple(mask_shape or inputs.shape), inputs))

    return self.function(params, drop, images)


def from_functions(
  init: Callable[[Key], Params],
  apply: Callable[[Params, Drop, Images], Logits],
  image_shape: tuple[int, int, int],
  rates: Mapping[str, float],
) -> DropoutModel:
  """Turns plain functions, of whatever library, into a `DropoutModel`.

  Its dense layers are not known, so gradients are compared whole, labels cannot be recovered,
  and of the closed forms only that of patches applies.

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
    InputError: sites and rates do not match, a rate is out of range, or the functions draw random
      numbers by themselves.
  """
  network = FunctionNetwork(init, apply, check_image_shape(image_shape))
  model = model_of(network, rates)
  discovery.check_no_randomness(network, "Leave dropout to the function `drop` that it is given.")
  return model
