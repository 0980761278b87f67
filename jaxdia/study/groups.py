"""Which cells of a study share a compiled program, so that their trials fill the lanes together."""

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax

from jaxdia.core.errors import InputError
from jaxdia.engine import total_memory
from jaxdia.experiment.clients import load_images
from jaxdia.experiment.config import (
  ClientsSettings,
  DataSettings,
  ExperimentSettings,
  ModelSettings,
)
from jaxdia.experiment.network import create_model
from jaxdia.study.plan import Cell

# Of the memory, the share that the gradients of all clients of a group may take.
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

  Cells are apart in which the attack needs another program: another network, other shapes, rate 0
  (which has no masks), or other settings than `AttackSettings` has as leaves. So are cells
  whose gradients would not fit into the memory together.

  Args:
    cells: of the study; those that cannot be run are in no group.
  """
  found: dict[Hashable, list[Group]] = {}  # by program
  # By program, of the clients of its last group.
  sizes: dict[Hashable, dict[ClientsSettings, int]] = {}
  most = _MEMORY_SHARE * total_memory()
  for number, cell in enumerate(cells):
    if cell.settings is None:
      continue
    clients, size = cell.settings.clients, _gradient_bytes(cell.settings)
    for name in cell.settings.attacks:
      program = _program(number, cell.settings, name)
      groups, inside = found.setdefault(program, []), sizes.setdefault(program, {})
      if groups and (clients in inside or sum(inside.values()) + size <= most):
        groups[-1] = groups[-1]._replace(cells=(*groups[-1].cells, number))
      else:
        groups.append(Group(name, (number,)))
        inside.clear()
      inside[clients] = size
  # Cell after cell, so that few need to be open at a time; the attacks of one in their order.
  return sorted((one for groups in found.values() for one in groups), key=lambda g: g.cells[0])


def _program(number: int, settings: ExperimentSettings, name: str) -> Hashable:
  """Returns what attacks of one program have in common."""
  attack, model = settings.attacks[name], settings.model
  form = _form(settings.data)
  # Nothing that runs in lanes, or a network whose rates may be its own.
  alone = form is None or attack.closed_form == "only" or ":" in model.name
  return (
    *(name, jax.tree.structure(attack), number if alone else form),
    *(model.name, model.options, model.dropout_rate == 0),
    *(settings.data.batch_size, settings.precision, settings.engine),
  )


@functools.lru_cache
def _form(data: DataSettings) -> tuple[Any, ...] | None:
  """Returns what of images makes a program; None if they cannot be loaded."""
  try:
    loaded = load_images(data)
  except InputError:  # the cell will say so when it is run
    return None
  return loaded.images.shape[1:], loaded.num_classes, len(loaded.statistics.mean)


def _gradient_bytes(settings: ExperimentSettings) -> int:
  d = settings.data
  one = dataclasses.replace(d, count=d.batch_size, mask_seeds=1)
  width = 8 if settings.precision == "float64" else 4
  return width * d.gradients * _entries(settings.model, one)


@functools.lru_cache
def _entries(network: ModelSettings, data: DataSettings) -> int:
  """Returns the number of entries of a gradient; 0 if there is none."""
  try:
    loaded = load_images(data)
    model = create_model(network, loaded.images.shape[1:], loaded.num_classes)
  except InputError:
    return 0
  params = jax.eval_shape(model.init, jax.random.key(0))
  return sum(leaf.size for leaf in jax.tree.leaves(params))
