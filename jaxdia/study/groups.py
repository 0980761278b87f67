"""Which cells of a study share a compiled program, so that their trials fill the lanes together."""

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax

from jaxdia.attacks import CATALOGUE, Attack
from jaxdia.core.errors import InputError
from jaxdia.core.machine import memory_of
from jaxdia.experiment.clients import KEPT, load_images
from jaxdia.experiment.config import (
  ClientsSettings,
  DataSettings,
  ExperimentSettings,
  ModelSettings,
)
from jaxdia.experiment.network import count_weights, create_model
from jaxdia.models import DropoutModel
from jaxdia.study.plan import Cell

# Of the memory, the share that the weights and gradients of all clients of a group may take.
_MEMORY_SHARE = 0.25


class Group(NamedTuple):
  """An attack in the cells in which one program runs it.

  Attributes:
    attack: its name.
    cells: their numbers.
  """

  attack: str
  cells: tuple[int, ...]

  def describe(self, cells: Sequence[Cell]) -> str:
    """Returns the group in a few words.

    Args:
      cells: of the study.
    """
    count = len(self.cells)
    return f"{self.attack} in {f'{count} cells' if count > 1 else cells[self.cells[0]].name}"


def group(cells: Sequence[Cell]) -> list[Group]:
  """Returns the groups of a study, in the order in which they are run.

  Cells are apart in which the attack needs another program: it, with its network, has another
  structure as a tree, or images or batches have other shapes. So are cells whose weights would
  not fit into the memory together.

  Args:
    cells: of the study; those that cannot be run are in no group.
  """
  found: dict[Hashable, list[Group]] = {}  # by program
  # By program, of the clients of its last group.
  sizes: dict[Hashable, dict[ClientsSettings, int]] = {}
  most = _MEMORY_SHARE * memory_of(jax.local_devices()[0])
  for number, cell in enumerate(cells):
    if cell.settings is None:
      continue
    clients = cell.settings.clients
    for name in cell.settings.attacks:
      program, size = _program(number, cell.settings, name)
      groups, inside = found.setdefault(program, []), sizes.setdefault(program, {})
      if groups and (clients in inside or sum(inside.values()) + size <= most):
        groups[-1] = groups[-1]._replace(cells=(*groups[-1].cells, number))
      else:
        groups.append(Group(name, (number,)))
        inside.clear()
      inside[clients] = size
  # Cell after cell, so that few need to be open at a time; the attacks of one in their order.
  return sorted((one for groups in found.values() for one in groups), key=lambda g: g.cells[0])


def attack_of(settings: ExperimentSettings, name: str) -> Attack | None:
  """Returns an attack of an experiment; None if it cannot be made, as the cell will say when run.

  Args:
    settings: of the experiment.
    name: of the attack.
  """
  try:
    return CATALOGUE[name].build(_network(settings)[0], settings.attacks[name])
  except InputError:
    return None


def _program(number: int, settings: ExperimentSettings, name: str) -> tuple[Hashable, int]:
  """Returns what attacks of one program have in common, and what clients take of the memory."""
  attack = attack_of(settings, name)
  if attack is None or attack.max_iterations == 0:  # nothing runs in lanes
    return (name, number), 0
  channels = _network(settings)[1]
  local = jax.tree.structure(settings.local.update), settings.local.shuffle
  defence = jax.tree.structure(settings.defence)  # the numbers of both may differ
  facts = (settings.data.batch_size, channels, settings.precision, local, defence)
  shared = (*facts, settings.engine)
  # The weights, and the gradients that are kept.
  size = (1 + KEPT) * count_weights(attack.model) * (8 if settings.precision == "float64" else 4)
  return (name, jax.tree.structure(attack), *shared), size


def _network(settings: ExperimentSettings) -> tuple[DropoutModel, int]:
  """Returns network and number of channels of the statistics."""
  data = dataclasses.replace(settings.data, count=settings.data.batch_size)
  return _load_network(settings.model, data)


@functools.lru_cache
def _load_network(model: ModelSettings, data: DataSettings) -> tuple[DropoutModel, int]:
  loaded = load_images(data)
  network = create_model(model, loaded.images.shape[1:], loaded.num_classes)
  return network, len(loaded.statistics.mean)
