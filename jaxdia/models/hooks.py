"""What a network tells of itself while it computes: the seam between it and everything else."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Bool, Float

from jaxdia.core.errors import InputError
from jaxdia.core.trees import Path
from jaxdia.core.types import Array
from jaxdia.models.convolutions import PlainConvolution


class Linear(NamedTuple):
  """A linear layer that is being called.

  Attributes:
    path: where its parameters are; `kernel`, and `bias` if it has one.
    convolution: of images, by itself; None for a dense layer.
  """

  path: Path
  convolution: PlainConvolution | None


class SiteCall(NamedTuple):
  """Dropout that is being called.

  Attributes:
    name: of the site.
    rate: that the network itself has for it; None if it has none.
    shape: of its mask.
    inputs: the activations.
    draw: `draw()` gives the mask that the library itself would draw, b[shape]; None where there
      is none.
  """

  name: str
  rate: float | None
  shape: tuple[int, ...]
  inputs: Float[Array, "..."]
  draw: Callable[[], Bool[Array, "..."]] | None = None


# on_site(call) -> activations after dropout
OnSite = Callable[[SiteCall], Float[Array, "..."]]
# on_linear(layer, inputs, outputs, nested) -> outputs; nested: inside a transformation like remat
OnLinear = Callable[[Linear, Float[Array, "..."], Float[Array, "..."], bool], Float[Array, "..."]]
# on_inactive(path), where dropout of a rate above 0 is switched off
OnInactive = Callable[[str], None]


class Hooks(NamedTuple):
  """Functions that a network calls while it computes.

  Attributes:
    on_site: at each dropout site, in place of its dropout.
    on_linear: after each linear layer that computes with its kernel as it is.
    on_inactive: for dropout that is switched off.
  """

  on_site: OnSite
  on_linear: OnLinear | None = None
  on_inactive: OnInactive = lambda path: None


class SiteNames:
  """Names sites by where they are; the second call of the same one is "path#2", and so on."""

  def __init__(self):  # noqa: D107
    self._calls: dict[str, int] = {}

  def __call__(self, path: str) -> str:
    """Returns the name of the next call of what is at a path."""
    self._calls[path] = self._calls.get(path, 0) + 1
    return path if self._calls[path] == 1 else f"{path}#{self._calls[path]}"


def check_plain_dropout(where: str, layer: Any, plain: type, name: str) -> None:
  """Refuses dropout that computes in a way of its own.

  Args:
    where: it is.
    layer: an instance of `plain`, or of a class that is derived from it.
    plain: the library's own class.
    name: of that class, for the message.

  Raises:
    InputError: it does.
  """
  if type(layer).__call__ is not plain.__call__:
    raise InputError(
      f"the dropout {where!r} is a {type(layer).__name__} with a __call__ of its own, so its"
      f" masks cannot be made explicit. Use {name}."
    )


def ignore_sites(call: SiteCall) -> Float[Array, "..."]:
  """Is an `OnSite` that makes dropout the identity."""
  return call.inputs
