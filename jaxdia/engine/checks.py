"""Checks of what the engine is given, before anything runs."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax

from jaxdia.attacks import check_attack, program_of
from jaxdia.closed_form import Parts, Recovery
from jaxdia.core.errors import InputError, check_count
from jaxdia.core.trees import is_traced
from jaxdia.core.types import check_key
from jaxdia.engine.jobs import Task
from jaxdia.engine.loop import init_trial, told_of


def check_tasks(tasks: Sequence[Task] | Task) -> list[Task]:
  """Returns tasks that can be run together in this process.

  Args:
    tasks: as in `jaxdia.engine.run`.

  Raises:
    InputError: see `jaxdia.engine.run`.
  """
  if isinstance(tasks, Task) or not isinstance(tasks, Iterable):
    tasks = [tasks]
  tasks = [_check_task(number, task) for number, task in enumerate(tasks)]
  if jax.process_count() > 1:
    raise InputError(
      f"this is one of {jax.process_count()} processes of jax.distributed, each of which would run"
      " all trials. Run the engine in one process, or give each its own share of the observations."
    )
  if not jax.sharding.get_abstract_mesh().empty:
    raise InputError(
      "a mesh is set, over which JAX would spread what belongs to one device. Call the engine"
      " outside of jax.set_mesh; it shares out its trials over the devices by itself."
    )
  counts = [(len(task.observations), task.restarts) for task in tasks]
  if not counts or min(min(pair) for pair in counts) < 1:
    pairs = ", ".join(f"{n} observations and {restarts} restarts" for n, restarts in counts)
    raise InputError(f"got {pairs or 'no tasks'}; expected at least one of each.")
  first = tasks[0]
  like = program_of(first.attack, first.observations[0])
  for number, task in enumerate(tasks):
    if program_of(task.attack, first.observations[0]) != like:
      raise InputError(
        f"task {number} needs another program than the first: its network or what its attack"
        " leaves free differs. Run it in a call of its own."
      )
    for what, given in (("masks", task.masks), ("parts", task.parts)):
      if isinstance(given, (Mapping, Parts, Recovery)):
        raise InputError(
          f"{what} of task {number} is {type(given).__name__}; expected a sequence, with one for"
          f" each observation. Use [{what}] for a single one."
        )
      if given is not None and len(given) != len(task.observations):
        raise InputError(
          f"task {number} has {len(given)} {what} for {len(task.observations)} observations;"
          " expected one for each."
        )
    if isinstance(task.observations, (list, tuple)):  # others are seen when they are attacked
      for i, observation in enumerate(task.observations):
        if program_of(task.attack, observation) != like:
          raise InputError(
            f"observation {i} of task {number} has another batch size, loss or defence, or"
            " params, statistics or labels of other shapes, than the first of all. Run it in a call"
            " of its own."
          )
    # An attack that lacks something says so here, not in the middle of a run.
    if len(set(task.finished)) < len(task.observations) * task.restarts:
      told = told_of(task, 0)
      jax.eval_shape(init_trial, task.attack, task.key, task.observations[0], told)
  return tasks


def _check_task(number: int, task: Any) -> Task:
  """Returns a task whose fields are of their kinds; what needs the others is checked later."""
  if not isinstance(task, Task):
    raise InputError(
      f"task {number} is of type {type(task).__name__}; expected an"
      " engine.Task(key, attack, observations)."
    )
  check_key(task.key, f"the key of task {number}")
  if is_traced(task.key):
    raise InputError(
      f"the key of task {number} is traced, as inside of jax.jit or jax.vmap; expected a value, as"
      " the engine runs from the host. Use attack.init and attack.step there."
    )
  many = task.observations
  is_sequence = hasattr(many, "__len__") and hasattr(many, "__getitem__")
  if not is_sequence or isinstance(many, (Mapping, str)):
    raise InputError(
      f"observations of task {number} is of type {type(many).__name__}; expected a sequence of"
      " them. Use [observation] for a single one, and list(...) of what goes through them."
    )
  # Others may compute an observation when it is asked for.
  known = many if isinstance(many, (list, tuple)) else [many[i] for i in range(min(1, len(many)))]
  for observation in known:
    check_attack(task.attack, observation)
  restarts = check_count(f"restarts of task {number}", task.restarts, 0)
  finished = task.finished
  if not isinstance(finished, Collection) or any(
    not isinstance(pair, tuple) or len(pair) != 2 for pair in finished
  ):
    raise InputError(
      f"finished of task {number} is {finished!r}; expected pairs of an observation and a restart,"
      " such as {(0, 0)}."
    )
  return task._replace(restarts=restarts)
