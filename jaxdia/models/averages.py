"""Running averages, such as those of BatchNorm, before and after a step."""

import functools
from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Shaped

from jaxdia.core.types import Array, Images, Masks, Params
from jaxdia.models.base import DropoutModel
from jaxdia.models.hooks import Hooks


class Averages(NamedTuple):
  """An array of running averages, before and after a client's step.

  Attributes:
    before: f[...].
    after: f[...], of the same shape.
  """

  before: Float[Array, "..."]
  after: Float[Array, "..."]


@runtime_checkable
class _Followed(Protocol):
  """A network that tells what a step makes of its constants."""

  def constants_after(
    self, params: Params, images: Images, hooks: Hooks, before: Mapping[str, Shaped[Array, "..."]]
  ) -> dict[str, Shaped[Array, "..."]]:
    """Returns them by their names, of those before the step."""
    ...


def follows_averages(model: DropoutModel) -> bool:
  """Returns whether it is known what a step makes of a network's running averages.

  Args:
    model: the network.
  """
  return isinstance(model.network, _Followed) and bool(model.network.constants())


def averages_after(
  model: DropoutModel,
  params: Params,
  masks: Masks | None,
  images: Images,
  before: Mapping[str, Shaped[Array, "..."]],
) -> dict[str, Shaped[Array, "..."]]:
  """Returns what a step on some images makes of running averages.

  Args:
    model: a network that `follows_averages`.
    params: of the step.
    masks: of the step; None for none.
    images: f[B, H, W, C], normalised.
    before: {name: f[...]}, as `network.constants()` names them; the network's own in place of
      those that are missing.

  Returns:
    {name: f[...]}, of all its constants.
  """
  assert isinstance(model.network, _Followed)
  run = functools.partial(model.network.constants_after, before=before)
  return model._call(params, masks, images, None, run)
