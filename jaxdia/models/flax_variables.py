"""Variables of a Flax module besides its params, such as the running averages of BatchNorm."""

import functools
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np
from flax import linen as nn

from jaxdia.core.errors import InputError, check_number
from jaxdia.core.precision import usual_promotion
from jaxdia.core.trees import Constants, leaves_by_path, with_leaves
from jaxdia.core.types import Key


class _Network(Protocol):
  """What is needed of a module as a network."""

  name: str

  def init_variables(self, key: Key) -> dict[str, Any]:
    """Draws all collections."""
    ...

  def __hash__(self) -> int:
    """Returns the same for equal networks, for which what was found is kept."""
    ...


@functools.lru_cache(maxsize=32)
def _initial_collections(network: _Network) -> tuple[Constants, str]:
  """Returns what a module's other collections are at first, and a leaf that was drawn, if any."""

  def draw(key):
    with usual_promotion():
      variables = network.init_variables(key)
    return {name: tree for name, tree in variables.items() if name != "params"}

  if not jax.eval_shape(draw, jax.random.key(0)):
    return Constants({}), ""
  draw = jax.jit(draw)  # so that the params need not be drawn
  first, second = draw(jax.random.key(0)), draw(jax.random.key(1))
  others = leaves_by_path(second)
  drawn = [p for p, leaf in leaves_by_path(first).items() if not np.array_equal(leaf, others[p])]
  return Constants(first), "/".join(drawn[0]) if drawn else ""


def fit_collections(network: _Network, variables: Mapping[str, Any] | None) -> Constants:
  """Returns the given collections if they fit the module, or those that it has at first.

  Args:
    network: of the module, with whatever collections.
    variables: by collection; "params" among them are left out.

  Raises:
    InputError: they are of other names or shapes, or missing where they are drawn at random.
  """
  initial, drawn = _initial_collections(network)
  if variables is None:
    if drawn:
      raise InputError(
        f"{network.name} keeps state that is drawn at random, {drawn}, as the power iteration of"
        " nn.SpectralNorm does, and its gradient depends on it. Pass variables to from_flax: the"
        " collections besides 'params' as the client has them."
      )
    return initial
  given = {name: nn.unbox(tree) for name, tree in variables.items() if name != "params"}
  found, expected = leaves_by_path(given), leaves_by_path(initial.tree)
  for path in [p for p in found if p not in expected] + [p for p in expected if p not in found]:
    name, known = "/".join(path), ", ".join("/".join(p) for p in list(expected)[:4]) or "none"
    problem = "have the leaf {!r}, which" if path in found else "lack the leaf {!r}, which"
    verb = "lacks" if path in found else "has"
    raise InputError(
      f"variables {problem.format(name)} {network.name} {verb}; expected {known}"
      f"{', ...' if len(expected) > 4 else ''}, its collections besides 'params'."
    )
  for path, leaf in found.items():
    if np.shape(leaf) != expected[path].shape:
      raise InputError(
        f"the leaf {'/'.join(path)!r} of variables has shape {np.shape(leaf)}; expected"
        f" {expected[path].shape}, as {network.name} has it."
      )
  return Constants(with_leaves(initial.tree, found))


def batch_moments(old: Any, new: Any, momentum: float = 0.99) -> Any:
  """Returns the mean and variance of a client's batch, which new running averages give away.

  A step makes `new = momentum * old + (1 - momentum) * batch`. Of several steps it is their mean,
  the later ones with more weight.

  Args:
    old: running averages before the step, such as `variables["batch_stats"]`.
    new: those after it, a tree like `old`.
    momentum: of the layers, in [0, 1): 0.99 by default as in `nn.BatchNorm`. PyTorch's is the
      other part, so its 0.1 is 0.9 here, and its variances are those of n - 1.

  Returns:
    A tree like `old`: at each BatchNorm the mean and variance of the batch; differences of nearly
    equal numbers, so rounding counts 1 / (1 - momentum) times.

  Raises:
    InputError: the averages do not fit together, or momentum is out of range.
  """
  momentum = check_number("momentum", momentum, lambda m: 0 <= m < 1, "a number in [0, 1)")
  before, after = leaves_by_path(old), leaves_by_path(new)
  for path in sorted(set(before) ^ set(after)):
    which = ("old", "new") if path in before else ("new", "old")
    raise InputError(
      f"the {which[0]} running averages have the leaf {'/'.join(path)!r}, which the {which[1]} ones"
      " lack; expected trees of the same names."
    )

  def moments(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return ((b - momentum * a) / (1 - momentum)).astype(np.float32)

  return with_leaves(old, {path: moments(before[path], after[path]) for path in before})
