"""Which cells of a study share a compiled program, so that their trials fill the lanes together."""

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax

from jaxdia.attacks import CATALOGUE, Attack, program_of
from jaxdia.client import Observation
from jaxdia.core.errors import InputError
from jaxdia.core.machine import memory_of
from jaxdia.experiment.clients import KEPT, load_images
from jaxdia.experiment.config import (
  ClientsSettings,
  DataSettings,
  ExperimentSettings,
  ModelSettings,
)
from jaxdia.experiment.network import create_model
from jaxdia.models import DropoutModel, discovery
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

  Cells are apart in which the attack needs another program (see `jaxdia.attacks.program_of`), or
  the engine other settings. So are cells whose weights would not fit into the memory together.

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
    model = dataclasses.replace(_network(settings)[0], convolve=settings.engine.convolve)
    return CATALOGUE[name].build(model, settings.attacks[name])
  except InputError:
    return None


def _program(number: int, settings: ExperimentSettings, name: str) -> tuple[Hashable, int]:
  """Returns what attacks of one program have in common, and what clients take of the memory."""
  attack = attack_of(settings, name)
  if attack is None or attack.max_iterations == 0:  # nothing runs in lanes
    return (name, number), 0
  try:
    shown = _observation_like(settings, with_labels=attack.labels == "given")
  except InputError:  # as the cell will say when it is run
    return (name, number), 0
  # The weights, and the gradients that are kept.
  size = (1 + KEPT) * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shown.params))
  return (name, program_of(attack, shown), settings.engine), size


def _observation_like(settings: ExperimentSettings, *, with_labels: bool) -> Observation:
  """Returns the shapes of what the server sees of the clients of an experiment."""
  model, channels = _network(settings)
  size, precision = settings.data.batch_size, settings.precision

  def like(*shape, dtype=precision):
    return jax.ShapeDtypeStruct(shape, dtype)

  def build(key, params, labels, mean, std):
    local = settings.local.of(key, size)
    more = {"local": local, "defence": settings.defence}
    return Observation(params, params, labels, mean, std, size, **more)

  params = jax.tree.map(lambda x: like(*x.shape), discovery.params_shape(model.network))
  labels = like(size, dtype="int32") if with_labels else None
  with jax.enable_x64(precision == "float64"):
    numbers = like(channels)
    return jax.eval_shape(build, jax.random.key(0), params, labels, numbers, numbers)


def _network(settings: ExperimentSettings) -> tuple[DropoutModel, int]:
  """Returns network and number of channels of the statistics."""
  data = dataclasses.replace(settings.data, count=settings.data.batch_size)
  return _load_network(settings.model, data)


@functools.lru_cache
def _load_network(model: ModelSettings, data: DataSettings) -> tuple[DropoutModel, int]:
  loaded = load_images(data)
  network = create_model(model, loaded.images.shape[1:], loaded.num_classes)
  return network, len(loaded.statistics.mean)
