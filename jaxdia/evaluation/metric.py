"""What a metric is: what it measures, how it is shown, and in which tables."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float

from jaxdia.core.precision import full_precision
from jaxdia.core.types import Array, HostImages

# The table at the end of a run and of a study, that of the report, and that of a published study.
TABLES = ("run", "study", "report", "published")
# Images that a compiled metric takes at once; by themselves they take as long.
_BLOCK = 8

# A number an image, or whether something holds of it.
Scores = Float[np.ndarray, " batch"] | Bool[np.ndarray, " batch"]


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Reconstructions beside their originals, which is what a metric of images is given.

  Attributes:
    originals: f32[B, H, W, C], pixels in [0, 1].
    reconstructions: f32[B, H, W, C], pixels in [0, 1], in the same order.
    normalized: both once more as they were searched: f[B, H, W, C], normalised.
    pool: f32[P, H, W, C], pixels of images among which the originals are, if there are such.
  """

  originals: HostImages
  reconstructions: HostImages
  normalized: tuple[HostImages, HostImages]
  pool: Float[np.ndarray, "pool height width channels"] | None = None

  @property
  def pixels(self) -> tuple[HostImages, HostImages]:
    """Originals and reconstructions."""
    return self.originals, self.reconstructions

  @functools.cached_property
  def scaled(self) -> tuple[HostImages, HostImages]:
    """Both, each image stretched to reach from 0 to 1."""
    return rescale(self.originals), rescale(self.reconstructions)


class Column(NamedTuple):
  """A statistic of a metric as a column of tables.

  Attributes:
    statistic: "mean", "std", "median", "min", "max", "ci95_low", "ci95_high", "value", a count of
      images, or "success_at_T": the share of images that reach the threshold T.
    key: name in `table.csv`, which has all columns.
    heading: in the tables that people read, without the unit; see `Metric.heading`.
    tables: which of them have it.
  """

  statistic: str
  key: str
  heading: str = ""
  tables: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
  """A number of the results; its entry in the registry is all that there is to it.

  Attributes:
    name: column of results.jsonl, and key of summary.json.
    label: what people read, without the unit; see `title`.
    meaning: one line for those who do not know it.
    format: of its numbers; what is written with an exponent is drawn on a logarithmic axis.
    unit: of its numbers, which titles and headings show; empty if they have none.
    larger_is_better: for the attacker; None where neither is.
    function: of `Pairs`, gives f[B], or None where it does not apply; None for what is no metric
      of images alone.
    thresholds: of its success curve, from easy to hard; empty if it has none.
    of: what one number is of: an image, a trial (all its images share it), a dropout site, or all
      images of an attack.
    columns: of the tables; its mean in all of them if None.
  """

  name: str
  label: str
  meaning: str
  format: str = "{:.3g}"
  unit: str = ""
  larger_is_better: bool | None = None
  function: Callable[[Pairs], Scores | None] | None = None
  thresholds: tuple[float, ...] = ()
  of: Literal["image", "trial", "site", "attack"] = "image"
  columns: tuple[Column, ...] | None = None

  def __post_init__(self):
    """Fills in the columns."""
    if self.columns is None:
      mean = Column("mean", f"{self.name}_mean", self.label, TABLES)
      object.__setattr__(self, "columns", (mean,))

  @property
  def title(self) -> str:
    """What people read over its numbers: its label, and their unit."""
    return f"{self.label}, {self.unit}" if self.unit else self.label

  def heading(self, column: Column) -> str:
    """Returns what people read over a column of it, with the unit.

    Args:
      column: one of its columns.
    """
    is_share = column.statistic.startswith("success_at_")
    return f"{column.heading}, {self.unit}" if self.unit and not is_share else column.heading


def rescale(images: HostImages) -> HostImages:
  """Returns images each scaled to [0, 1], so that contrast and brightness do not count.

  Args:
    images: f[B, H, W, C]; an image of one value becomes 0.
  """
  axes = (1, 2, 3)
  low, high = (f(images, axis=axes, keepdims=True) for f in (np.min, np.max))
  return (images - low) / np.where(high > low, high - low, 1)


def compiled(
  function: Callable[..., Float[Array, " batch"]],
) -> Callable[..., Float[np.ndarray, " batch"]]:
  """Compiles a metric so that any number of images takes at most two programs.

  Args:
    function: of two f[B, H, W, C], and what else it takes, gives f[B], each image by itself.

  Returns:
    The same for host arrays: images are taken in blocks of a fixed size, the last one padded.
  """

  @jax.jit
  def program(*arguments):
    with full_precision():
      return function(*arguments)

  @functools.wraps(function)
  def in_blocks(a, b, *more):
    size = 1 if len(a) == 1 else _BLOCK
    padding = [(0, -len(a) % size)] + [(0, 0)] * (a.ndim - 1)
    pairs = [np.pad(x, padding, mode="edge") for x in (a, b)]
    starts = range(0, len(pairs[0]), size)
    blocks = [program(*(x[i : i + size] for x in pairs), *more) for i in starts]
    return np.concatenate([np.asarray(block) for block in blocks])[: len(a)]

  return in_blocks
