"""Running averages that came with an update, before and after the client's step."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdia.core.errors import InputError
from jaxdia.core.types import NamedArrays
from jaxdia.models import Averages, DropoutModel, follows_averages
from jaxdia.updates.names import parts_of
from jaxdia.updates.problems import listed

# Averages whose change is no more than so many times the rounding of their type tell nothing.
_LEAST_CHANGE = 100.0


class NewAverages(NamedTuple):
  """What an update tells by running averages.

  Attributes:
    averages: as an `Observation` takes them; None if there are none to be used.
    notes: why some or all are left out, each a sentence.
  """

  averages: dict[str, Averages] | None
  notes: tuple[str, ...]


def use_averages(model: DropoutModel, arrays: NamedArrays) -> DropoutModel:
  """Returns a model with the running averages that a server sent, such as those of BatchNorm.

  In evaluation mode, or where they are frozen, the gradient depends on them.

  Args:
    model: in training mode, with whatever averages.
    arrays: that the server sent and that are no params, as `Fit.extra` has them; of others than
      the model has nothing is used.

  Raises:
    InputError: averages have another shape than those of the model, or are not finite.
  """
  own = _by_name(model, arrays)
  if not own:
    return model
  for name, array in own.items():
    if not np.isfinite(array.astype(np.float64)).all():
      raise InputError(
        f"the running averages {name} of the weights before have NaN or infinite entries; expected"
        " those that the server sent, with which the network can be computed."
      )
  return dataclasses.replace(model, network=model.network.with_constants(own))


def find_averages(
  model: DropoutModel,
  before: NamedArrays,
  after: NamedArrays,
  *,
  is_difference: bool = False,
  local_steps: int = 1,
) -> NewAverages:
  """Finds running averages, such as those of BatchNorm, that a client's step has changed.

  Args:
    model: whose averages they are, in training mode.
    before: arrays that the server sent and that are no params, as `Fit.extra` has them.
    after: those that the client sent back.
    is_difference: whether these are after - before.
    local_steps: of the client.

  Returns:
    The averages before and after, by their names in the model.
  """
  old, new = (_by_name(model, arrays) for arrays in (before, after))
  if not new:
    return NewAverages(None, ())
  what = "the update's running averages are not used:"
  if not follows_averages(model):
    reason = f"what a step of {model.network.name} makes of them is not known"
    return NewAverages(None, (f"{what} {reason}.",))
  if local_steps > 1:
    return NewAverages(
      None, (f"{what} after {local_steps} steps they are not those of one batch.",)
    )
  found, lacking, broken, still = {}, [], [], []
  for name, array in new.items():
    if name not in old or old[name].shape != array.shape:
      lacking.append(name)
      continue
    start, end = old[name].astype(np.float64), array.astype(np.float64)
    end = start + end if is_difference else end
    unit = max(float(jnp.finfo(of.dtype).eps) for of in (old[name], array))
    if not (np.isfinite(start).all() and np.isfinite(end).all()):
      broken.append(name)
    elif np.linalg.norm(end - start) > _LEAST_CHANGE * unit * np.linalg.norm(end):
      found[name] = Averages(start, end)
    else:
      still.append(name)
  notes = []
  if lacking:
    notes.append(f"{what} of {listed(lacking)} there are none of this shape before the step.")
  if broken:
    notes.append(f"{what} {listed(broken)} have NaN or infinite entries.")
  if still and found:
    notes.append(
      f"the running averages {listed(still)} hardly changed, next to rounding, and are left out."
    )
  return NewAverages(found or None, tuple(notes))


def _by_name(model: DropoutModel, arrays: NamedArrays) -> NamedArrays:
  """Returns the arrays that are constants of the model, of floats, by their names there."""
  parts = {name: parts_of(name) for name in model.network.constants()}
  return {
    own: array
    for name, array in arrays.items()
    for own, ends in parts.items()
    if parts_of(name)[-len(ends) :] == ends and jnp.issubdtype(array.dtype, jnp.floating)
  }
