"""What the clients of an experiment do before they send anything."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxdia.client import LocalUpdate, as_local, shuffled
from jaxdia.client.local import Optimizer
from jaxdia.core.types import Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalSettings:
  """What the clients do before they send anything; see `jaxdia.client.LocalUpdate`.

  Attributes:
    epochs: passes through a client's images.
    steps: of an epoch, each with its part of the images.
    optimizer: "sgd" or "adam".
    learning_rate: of the optimiser, which the server set.
    momentum: of SGD.
    clients: whose updates are averaged before the server sees them; `data.batch_size` are the
      images of all of them.
    shuffle: whether each epoch has an order of its own, which the server is told.
  """

  epochs: int = 1
  steps: int = 1
  optimizer: Optimizer = "sgd"
  learning_rate: float = 0.01
  momentum: float = 0.0
  clients: int = 1
  shuffle: bool = False

  def __post_init__(self):
    assert self.update  # refuses what it cannot take

  @property
  def update(self) -> LocalUpdate:
    """The local steps, in the order in which the images stand."""
    fields = dataclasses.asdict(self)
    del fields["shuffle"]
    return LocalUpdate(**fields)

  def of(self, key: Key, batch_size: int) -> LocalUpdate | None:
    """Returns the local steps, in an order of each epoch's own if they are shuffled.

    Args:
      key: random key, of the orders.
      batch_size: images of all clients.

    Returns:
      The steps; None if they are but the gradient of one batch.
    """
    return as_local(shuffled(key, self.update, batch_size) if self.shuffle else self.update)


def describe(local: Mapping[str, Any]) -> str | None:
  """Returns what clients do before they send anything, for people to read; None for one gradient.

  Args:
    local: fields of `LocalSettings`, of which results of other versions may lack some.
  """
  fields = dataclasses.asdict(LocalSettings()) | dict(local)
  counts = tuple(fields[name] for name in ("epochs", "steps", "clients"))
  if counts == (1, 1, 1) and fields["optimizer"] == "sgd":
    return None
  parts = [
    f"{counts[0]} x {counts[1]} steps of {fields['optimizer']} at {fields['learning_rate']:g}"
  ]
  parts += [f"momentum {fields['momentum']:g}"] * bool(fields["momentum"])
  parts += ["in a new order each epoch"] * bool(fields["shuffle"])
  whose = "a client" if counts[2] == 1 else f"{counts[2]} clients, averaged"
  return f"the update of {whose} ({', '.join(parts)})"
