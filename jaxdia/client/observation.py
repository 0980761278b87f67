"""What the server sees of a client's training step, and what stays with the client."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float

from jaxdia.client.defences import Defence, as_defence, identity
from jaxdia.client.local import LocalUpdate, as_local
from jaxdia.client.losses import CROSS_ENTROPY, Loss, as_loss
from jaxdia.core.errors import InputError, check_count, kind_of
from jaxdia.core.trees import Path, is_traced, leaves_by_path, static, value_tree, with_leaves
from jaxdia.core.types import (
  Array,
  Gradient,
  Images,
  Labels,
  Masks,
  Params,
  Statistics,
  as_numbers,
  mend_of_labels,
)
from jaxdia.models import Averages, DropoutModel, check_model, check_params

_FLOATS = (jnp.float32, jnp.float64)


@value_tree
class Observation:
  """All that the server sees of one training step: the input of every attack.

  What is given as lists, tuples or NumPy arrays is converted; what does not fit together is
  refused.

  Attributes:
    params: the model's parameters, which the server sent; float32 or float64.
    gradient: of the client's loss, a tree like `params`, converted to their type. A leaf that is
      None or missing belongs to a frozen layer, of which no gradient was sent.
    labels: i[B], where the threat model grants them; otherwise None.
    mean: f[C] or f[1], public statistics of the kind of data.
    std: f[C] or f[1].
    batch_size: number of images in the client's batch, B.
    loss: what the client descends, which the server chose; the name of one or a function is
      converted, see `Loss`.
    averages: {name: `Averages`} of BatchNorm before and after the step, named as
      `model.network.constants()` names them, where the client sent those after it; else None.
    local: what the client did between the params and its update, of which the gradient then is
      what `LocalUpdate` says; None for the gradient of one batch.
    defence: what the client did to its gradient, as far as the server knows.

  Raises:
    InputError: the gradient is not one of these params, or labels, statistics or local steps are
      not those of such a batch; the message names the leaf.
  """

  params: Params
  gradient: Gradient
  labels: Labels | None
  mean: Float[Array, " channels"]
  std: Float[Array, " channels"]
  batch_size: int = static()
  loss: Loss = static(default=CROSS_ENTROPY)
  averages: dict[str, Averages] | None = None
  local: LocalUpdate | None = None
  defence: Defence = identity

  # Arrays have no hash; so Python's own message names this type, and not that of a field.
  __hash__ = None  # pyright: ignore[reportAssignmentType]

  def __post_init__(self):
    size = check_count("batch_size of the observation", self.batch_size, 1)
    unboxed = nn.unbox(self.params)
    dtype = _float_of(_as_arrays("params", unboxed))
    params = jax.tree.map(lambda leaf: _as_array(leaf, dtype), unboxed)
    fields = {
      "params": params,
      "gradient": _fit_gradient(params, nn.unbox(self.gradient)),
      "labels": _fit_labels(self.labels, size),
      **_fit_statistics(self.mean, self.std, dtype),
      "batch_size": size,
      "loss": as_loss(self.loss),
      "averages": _fit_averages(self.averages, dtype),
      "local": _fit_local(self.local, size, dtype),
      "defence": as_defence(self.defence),
    }
    if fields["local"] is not None and fields["defence"].of_step:
      raise InputError(
        f"the defence {type(self.defence).__name__} computes on a single training step, and the"
        f" client took {fields['local'].draws} local steps. Choose another defence,"
        " or one step."
      )
    for name, value in fields.items():
      object.__setattr__(self, name, value)

  @property
  def dtype(self) -> jnp.dtype:
    """Floating-point type that the attack computes in: that of the params."""
    return jnp.result_type(*jax.tree.leaves(self.params))


@value_tree
class Secret:
  """What stays with the client. Evaluation and the running of experiments alone may see it.

  Attributes:
    images: f[B, H, W, C], normalised.
    labels: i[B].
    masks: of the client's training step, or of all its local steps (see
      `jaxdia.client.draw_masks`); None if they are not known.
  """

  images: Images
  labels: Labels
  masks: Masks | None

  __hash__ = None  # pyright: ignore[reportAssignmentType]


def check_observation(observation: Any) -> None:
  """Refuses what is no observation.

  Args:
    observation: that is to be attacked.

  Raises:
    InputError: it is something else.
  """
  if not isinstance(observation, Observation):
    raise InputError(
      f"the observation is {kind_of(observation)}; expected a jaxdia.client.Observation, the first"
      " of the two that observe returns."
    )


def check_fit(model: DropoutModel, observation: Observation) -> None:
  """Refuses an observation that is not one of a model.

  Args:
    model: the network.
    observation: of one client; of traced arrays only shapes are checked.

  Raises:
    InputError: one of the two is of another kind; its params are of another network, it has
      statistics for other channels, or labels that are no classes of the model.
  """
  check_model(model)
  check_observation(observation)
  check_params(model.network, observation.params)
  channels = model.image_shape[-1]
  if len(observation.mean) not in (1, channels):
    raise InputError(
      f"the observation has mean and std for {len(observation.mean)} channels; expected one number"
      f" for each of the {channels} of the images of {model.network.name}, or one for all."
    )
  labels = observation.labels
  if labels is None or not _is_concrete(labels):
    return
  labels = np.asarray(labels)
  if wrong := labels[(labels < 0) | (labels >= model.num_classes)].tolist():
    raise InputError(
      f"the observation has the label {wrong[0]}; expected classes from 0 to"
      f" {model.num_classes - 1}, as {model.network.name} has. Correct the labels."
    )


def _fit_statistics(mean: Any, std: Any, dtype: Any) -> dict[str, Any]:
  """Returns mean and standard deviation as arrays of the params' type."""
  if _is_concrete(mean) and _is_concrete(std):
    mean, std = Statistics(mean, std)  # refuses what is none
  return {"mean": _as_array(mean, dtype), "std": _as_array(std, dtype)}


def _fit_averages(averages: Any, dtype: Any) -> dict[str, Averages] | None:
  """Returns running averages as arrays of the params' type."""
  if averages is None:
    return None
  fitted = {}
  for name, (before, after) in averages.items():
    before, after = _as_array(before, dtype), _as_array(after, dtype)
    if before.shape != after.shape:
      raise InputError(
        f"the averages {name!r} have the shape {before.shape} before the step and {after.shape}"
        " after it; expected one shape."
      )
    for array in (before, after):
      if _is_concrete(array) and not np.isfinite(np.asarray(array)).all():
        raise InputError(f"the averages {name!r} are not finite. Leave them out.")
    fitted[name] = Averages(before, after)
  return fitted


def _fit_local(local: LocalUpdate | None, size: int, dtype: Any) -> LocalUpdate | None:
  """Returns local steps with numbers of the params' type; None if they are but a gradient."""
  local = as_local(local)
  if local is None:
    return None
  local.images_a_step(size)  # refuses those that cannot be shared out
  numbers = ("learning_rate", "momentum")
  return dataclasses.replace(local, **{n: _as_array(getattr(local, n), dtype) for n in numbers})


def _is_concrete(array: Any) -> bool:
  return not (is_traced(array) or isinstance(array, jax.ShapeDtypeStruct))


def _as_array(value: Any, dtype: Any = None) -> Any:
  """Returns an array, or what stands for one where JAX traces."""
  if isinstance(value, (jax.Array, jax.ShapeDtypeStruct)) and dtype in (None, value.dtype):
    return value
  if isinstance(value, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(value.shape, dtype)
  return jnp.asarray(value, dtype)


def _as_arrays(what: str, tree: Any) -> Any:
  """Returns a tree whose leaves are arrays of numbers."""
  for path, leaf in leaves_by_path(tree).items():
    if not isinstance(getattr(leaf, "dtype", None), np.dtype) or not hasattr(leaf, "shape"):
      tensor = " Use tensor.detach().cpu().numpy()." if hasattr(leaf, "detach") else ""
      raise InputError(
        f"the leaf {'/'.join(path)!r} of the {what} is {type(leaf).__name__}; expected an array of"
        f" numbers.{tensor}"
      )
  return tree


def _float_of(params: Params) -> Any:
  types = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)})
  if len(types) != 1 or jnp.dtype(types[0]) not in _FLOATS:
    raise InputError(
      f"the params are {', '.join(types) or 'empty'}; expected all of float32, or all of float64."
      " Convert them: jax.tree.map(lambda x: x.astype('float32'), params)."
    )
  return jax.dtypes.canonicalize_dtype(types[0])  # float32 unless JAX may use more


def _fit_gradient(params: Params, gradient: Gradient) -> Gradient:
  """Returns a gradient as a tree like the params, of their type; None where it has no leaf."""
  found, leaves = leaves_by_path(gradient), leaves_by_path(params)
  is_named = hasattr(gradient, "_fields") and set(found) <= set(leaves)
  if isinstance(gradient, (list, tuple)) and not isinstance(params, Sequence) and not is_named:
    mend = ""
    if len(gradient) == len(leaves):
      mend = (
        " If they are in the order of its leaves, put them there by"
        " jax.tree.unflatten(jax.tree.structure(params), gradient)."
      )
    raise InputError(
      f"the gradient is a {type(gradient).__name__} of {len(gradient)}; expected a tree like the"
      f" params, which has {len(leaves)} leaves.{mend}"
    )
  if strange := [path for path in found if path not in leaves]:
    within = [path for path in strange if path[1:] in leaves]  # of more than the params
    path = (within or strange)[0]
    raise InputError(_strange_leaf(path, found[path], leaves))
  _as_arrays("gradient", gradient)
  if not found:
    raise InputError("the gradient has no leaf at all; expected a tree like the params.")
  for path, leaf in found.items():
    expected = leaves[path]
    if tuple(leaf.shape) != tuple(expected.shape):
      turned = tuple(leaf.shape) == tuple(expected.shape[::-1])
      mend = " Transpose it." if turned else " It may be of another network."
      if tuple(leaf.shape[1:]) == tuple(expected.shape):
        mend = " Of the gradients of single images take the mean over the first axis."
      raise InputError(
        f"the leaf {'/'.join(path)!r} of the gradient has shape {tuple(leaf.shape)}; expected"
        f" {tuple(expected.shape)} as in the params.{mend}"
      )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise InputError(
        f"the leaf {'/'.join(path)!r} of the gradient is {leaf.dtype}; expected floats."
      )
  dtype = _float_of(params)
  return with_leaves(
    params, {p: _as_array(found[p], dtype) if p in found else None for p in leaves}
  )


def _strange_leaf(path: Path, leaf: Any, leaves: dict[Path, Any]) -> str:
  name = "/".join(path)
  if not path and not hasattr(leaf, "shape"):
    return f"the gradient is of type {type(leaf).__name__}; expected a tree like the params."
  inside = [n for n in range(1, len(path)) if path[:n] in leaves]
  if inside and not hasattr(leaf, "shape"):
    return (
      f"the leaf {'/'.join(path[: inside[0]])!r} of the gradient is made of"
      f" {type(leaf).__name__}s; expected an array of numbers. Use numpy.asarray."
    )
  if len(path) > 1 and path[1:] in leaves:
    return (
      f"the gradient has the leaf {name!r}; expected {'/'.join(path[1:])!r} as in the params. Pass"
      f" gradient[{path[0]!r}]."
    )
  if not path:
    return (
      "the gradient is one array; expected a tree like the params. If it is all of their entries,"
      " use jax.flatten_util.ravel_pytree(params)[1](gradient)."
    )
  for mark, sep in (("/", "sep='/'"), (".", "sep='.'"), (", ", "")):  # the last of a tuple
    parts = tuple(part.strip("()'\"") for part in name.split(mark))
    if len(path) == 1 and (parts in leaves or parts[1:] in leaves):
      return (
        f"the gradient has the flat name {name!r}; expected a tree like the params. Use"
        f" flax.traverse_util.unflatten_dict(gradient{sep and ', ' + sep})."
      )
  known = ", ".join("/".join(p) for p in list(leaves)[:4])
  return (
    f"the gradient has the leaf {name!r}, which the params lack; they have {known}"
    f"{', ...' if len(leaves) > 4 else ''}. Name its leaves as theirs."
  )


def _fit_labels(labels: Any, size: int) -> Any:  # labels, or what stands for them in a trace
  if labels is None:
    return None
  labels = as_numbers(labels)
  if tuple(labels.shape) != (size,) or not jnp.issubdtype(labels.dtype, jnp.integer):
    raise InputError(
      f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected integers of shape"
      f" ({size},), one class for each of batch_size={size} images.{mend_of_labels(labels, size)}"
    )
  return _as_array(labels, jnp.dtype(jnp.int32))
