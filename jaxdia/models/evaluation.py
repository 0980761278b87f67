"""The evaluation mode of a network, as a network of its own."""

import dataclasses
from typing import Any

from jaxdia.core.types import Images, Key, Params
from jaxdia.models.base import DropoutModel, Network, model_of
from jaxdia.models.hooks import Hooks, ignore_sites
from jaxdia.models.layers import Entry


@dataclasses.dataclass(frozen=True)
class EvaluationNetwork(Network):
  """A network whose dropout is switched off, so that it has no sites; see `evaluation_mode`."""

  network: Network

  @property
  def name(self) -> str:
    """Name of the network."""
    return self.network.name

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, channels)."""
    return self.network.image_shape

  def init(self, key: Key) -> Params:
    """Draws parameters."""
    return self.network.init(key)

  def call(self, params: Params, images: Images, hooks: Hooks, rngs: Any = None) -> Any:
    """Computes logits without dropout, and calls the other hooks."""
    return self.network.call(params, images, hooks._replace(on_site=ignore_sites), rngs)

  def entries(self) -> dict[str, Entry]:
    """Returns where each array lies, as of the network itself."""
    return self.network.entries()

  def constants(self) -> tuple[str, ...]:
    """Returns the names of arrays that no training changes, as of the network itself."""
    return self.network.constants()


def evaluation_mode(model: DropoutModel) -> DropoutModel:
  """Returns a model without dropout: that of a client which computes in evaluation mode.

  BatchNorm takes its running averages there; of Flax Linen, if an argument of the call says so.

  Args:
    model: with dropout or without.
  """
  network = model.network.evaluation()
  if not model.rates and not network.constants():
    return model
  return model_of(EvaluationNetwork(network))
