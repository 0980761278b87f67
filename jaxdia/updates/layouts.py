"""Layouts of other libraries turned into that of Flax."""

import math

import numpy as np
from jaxtyping import Shaped

from jaxdia.core.trees import Path
from jaxdia.core.types import NamedArrays
from jaxdia.models import DropoutModel
from jaxdia.models.layers import shape_before

# From PyTorch's output x input x positions to Flax's positions x input x output, by rank.
_OF_PYTORCH = {2: (1, 0), 3: (2, 1, 0), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}


def turned(
  foreign: dict[Path, str],
  leaves: dict[Path, tuple[int, ...]],
  arrays: NamedArrays,
  notes: list[str],
) -> dict[Path, tuple[int, ...] | None]:
  """Returns the axes by which kernels that are named as PyTorch names them are turned.

  All of them have one layout: PyTorch's if it fits them all, and else that of Flax.

  Args:
    foreign: {path: name} of arrays that are not named as in the model's own library.
    leaves: {path: shape} of the params.
    arrays: by name.
    notes: what was assumed is added.
  """
  kernels = {
    path: _OF_PYTORCH[len(leaves[path])]
    for path, name in foreign.items()
    if path[-1] == "kernel" and name.endswith("weight") and len(leaves[path]) in _OF_PYTORCH
  }
  if not kernels:
    return {}
  path = next(iter(kernels))
  name = foreign[path]
  if all(arrays[foreign[p]].shape == leaves[p] for p in kernels) and not all(
    arrays[foreign[p]].shape == shape_before(leaves[p], axes) for p, axes in kernels.items()
  ):
    notes.append(f"arrays such as {name!r} have the layout inputs x outputs, as Flax's kernels.")
    return dict.fromkeys(kernels)
  notes.append(
    f"arrays such as {name!r} were turned from PyTorch's layout, outputs x inputs, to"
    f" {'/'.join(path)!r}."
  )
  return dict(kernels)


def put_channels_last(
  model: DropoutModel,
  kernels: list[Path],
  found: dict[Path, Shaped[np.ndarray, "..."]],
  notes: list[str],
) -> None:
  """Puts rows of dense kernels in the order in which Flax flattens an image or its features.

  PyTorch has the channels first, so its rows of a layer after a flattening are in that order.

  Args:
    model: whose inputs and convolutions tell the shapes.
    kernels: paths of those that came from PyTorch.
    found: {path: array}, changed in place.
    notes: what was assumed is added.
  """
  dense = [(*layer.path, "kernel") for layer in model.dense(2)]
  outputs = [layer.output_shape for layer in model.convolutions]
  # What comes before the first dense layer is flattened, if it is flattened at all.
  if not dense or dense[0] not in kernels:
    return
  path = dense[0]
  rows = len(found[path])
  shapes = {math.prod(shape): shape for shape in (model.image_shape, *outputs)}
  height, width, channels = shapes.get(rows, (1, 1, 1))
  if height * width > 1 and channels > 1:
    kernel = found[path].reshape(channels, height, width, -1)
    found[path] = np.moveaxis(kernel, 0, 2).reshape(rows, -1)
    notes.append(
      f"the rows of {'/'.join(path)!r} were put from the order channels, height, width, in which"
      f" PyTorch flattens, into height, width, channels of {(height, width, channels)}."
    )
  elif outputs and rows not in shapes and rows not in {shape[-1] for shape in outputs}:
    notes.append(
      f"PyTorch flattens features with the channels first; if this network flattens them before"
      f" {'/'.join(path)!r}, its rows are in another order."
    )
