"""The names that the rest of the package uses for arrays and trees of arrays."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer, Shaped

from jaxdia.core.errors import InputError

# JAX's arrays and NumPy's take each other's place; only their stubs do not say so.
if TYPE_CHECKING:
  Array = jax.Array
else:
  Array = jax.Array | np.ndarray

# Axes of one name are of one length in a call; the tests check it.
Key = jax.Array  # a typed key, from `jax.random.key`
Scalar = Float[Array, ""]
Number = float | Scalar  # of Python, or of a program
Images = Float[Array, "batch height width channels"]  # normalised
HostImages = Float[np.ndarray, "batch height width channels"]  # on the host
Labels = Integer[Array, " batch"] | Float[Array, "batch classes"]  # classes, or probabilities
Logits = Float[Array, "batch classes"]
# What callers may give as lists too; who takes it looks at it, so that it is refused in a line.
ImagesLike = Images | Sequence[Any]
LabelsLike = Integer[Array, " batch"] | Sequence[Any]
TokensLike = Integer[Array, "batch positions"] | Sequence[Any]
FeaturesLike = Shaped[Array, "rows *frames features"] | Sequence[Any]
Params = Any  # a pytree of arrays
Gradient = Any  # a pytree like Params
Masks = dict[str, Shaped[Array, "..."]]  # one array for each dropout site, 1 = kept
NamedArrays = dict[str, Shaped[np.ndarray, "..."]]  # by the names of a file or a framework


@dataclasses.dataclass(frozen=True)
class Statistics:
  """What normalises the images of a data set: `(pixel - mean) / std` by channel.

  Equal by value, and `mean, std = statistics` takes it apart.

  Attributes:
    mean: one float a channel, for pixels in [0, 1]. It may be given as a list or an array, and
      for one channel as a number.
    std: likewise.

  Raises:
    InputError: they are no such numbers, or not as many of one as of the other.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]

  def __post_init__(self) -> None:
    for name in ("mean", "std"):
      object.__setattr__(self, name, _floats(getattr(self, name), f"statistics.{name}"))
    if len(self.mean) != len(self.std):
      raise InputError(
        f"statistics have {len(self.mean)} means and {len(self.std)} standard deviations;"
        " expected one of each a channel."
      )
    if min(self.mean) < 0 or max(self.mean) > 1:
      raise InputError(
        f"statistics.mean is {self.mean}; expected values from 0 to 1, as pixels have. Divide mean"
        " and std by 255 if they are for pixels from 0 to 255."
      )
    if min(self.std) <= 0:
      raise InputError(
        f"statistics.std is {self.std}; expected values above 0. Use 1 for a channel that is not"
        " to be scaled."
      )

  def __iter__(self) -> Iterator[tuple[float, ...]]:
    return iter((self.mean, self.std))

  @classmethod
  def of_box(
    cls,
    mean: Float[Array, " columns"],
    std: Float[Array, " columns"],
    low: Float[Array, " columns"],
    high: Float[Array, " columns"],
  ) -> "Statistics":
    """Returns the statistics of what is no picture: a pixel of 0 is its least value, one of 1 its
    largest, so that the box of valid pixels is that of its columns.

    Args:
      mean: f[C], what was taken from each column to normalise it.
      std: f[C], what each was then divided by.
      low: f[C], least value of each.
      high: f[C], largest value of each.
    """
    centre, scale, least, most = (np.asarray(x, np.float64) for x in (mean, std, low, high))
    span = np.where(most > least, most - least, 1)
    pixels = np.clip((centre - least) / span, 0, 1)
    return cls(_floats(pixels, "mean"), _floats(scale / span, "std"))


def as_statistics(value: Any) -> Statistics:
  """Returns statistics that may be given as a pair of mean and standard deviation.

  Args:
    value: `Statistics`, or what they can be made of.

  Raises:
    InputError: it is no such thing.
  """
  if isinstance(value, Statistics):
    return value
  pair: Any = () if isinstance(value, (str, Mapping)) else value
  try:
    mean, std = pair
  except (TypeError, ValueError) as error:
    shown = " ".join(repr(value).split())  # arrays take many lines
    raise InputError(
      f"statistics is {shown}; expected a Statistics(mean, std), or the two as a pair. Those of a"
      " data set are jaxdia.data.statistics_of(name)."
    ) from error
  return Statistics(mean, std)


def check_key(key: Any, what: str = "key") -> Key:
  """Returns a random key, or refuses what is no single one.

  Args:
    key: of `jax.random.key`, or of the older `jax.random.PRNGKey`.
    what: what the message calls it.

  Raises:
    InputError: it is something else.
  """
  dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
  is_typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
  if (is_typed and shape == ()) or (dtype == np.uint32 and shape is not None and len(shape) == 1):
    return key
  got = type(key).__name__ if shape is None else f"{dtype} of shape {tuple(shape)}"
  raise InputError(f"{what} is {got}; expected one random key. Use jax.random.key(0).")


def mend_of_labels(labels: Any, size: int) -> str:
  """Returns what makes labels of other forms classes, for the end of a message.

  Args:
    labels: an array.
    size: number of images.
  """
  shape = tuple(labels.shape)
  if shape == (size,) and jnp.issubdtype(labels.dtype, jnp.floating):
    return " Use labels.astype(int) if they are whole numbers."
  if shape == (size,) and labels.dtype == bool:
    return " Use labels.astype(int)."
  if shape != (size,) and math.prod(shape) == size:
    return " Use labels.ravel()."
  if len(shape) == 2 and shape[0] == size:
    return " Use labels.argmax(1) if they are one-hot or probabilities."
  return ""


def as_numbers(value: Any) -> Any:
  """Returns an array of numbers as it is, and lists and tensors of other libraries as NumPy's.

  Args:
    value: anything; what cannot be converted becomes an array of objects.
  """
  if isinstance(value, jax.Array) or isinstance(getattr(value, "dtype", None), np.dtype):
    return value
  try:
    return np.asarray(value)
  except Exception:  # what a library raises that does not let itself be converted
    array = np.empty((), object)
    array[()] = value
    return array


def _floats(values: Any, name: str) -> tuple[float, ...]:
  """Returns a number, or a sequence or array of one axis, as finite floats."""
  try:
    array = np.atleast_1d(np.asarray(values, np.float64))
  except (TypeError, ValueError):
    array = np.array([])
  if array.ndim != 1 or not array.size or not np.isfinite(array).all():
    shown = " ".join(repr(values).split())  # arrays take many lines
    raise InputError(f"{name} is {shown}; expected one finite number a channel.")
  return tuple(array.tolist())
