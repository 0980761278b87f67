"""Pictures: originals above reconstructions."""

import io
import pathlib
from collections.abc import Sequence

import numpy as np

from jaxdia.core.files import write_atomically
from jaxdia.core.types import HostImages

_MAX_COLUMNS = 16


def write_grid(
  path: pathlib.Path,
  originals: HostImages,
  reconstructions: dict[str, HostImages],
  captions: dict[str, Sequence[str]],
) -> None:
  """Writes a PNG: a row of originals, then a row for each attack.

  Args:
    path: of the PNG.
    originals: f[N, H, W, C], pixels in [0, 1]; the first 16 are shown.
    reconstructions: of the same shape, by attack; NaN where there is none.
    captions: a text under each reconstruction, by attack.
  """
  from matplotlib.figure import Figure  # slow to import, and no command needs it to start

  columns = min(len(originals), _MAX_COLUMNS)
  rows = 1 + len(reconstructions)
  # Without pyplot, which belongs to the user's own program.
  figure = Figure(figsize=(1.25 * columns + 0.7, 1.55 * rows), dpi=120)
  axes = figure.subplots(rows, columns, squeeze=False)
  images = {"original": originals} | reconstructions
  for row, (name, batch) in enumerate(images.items()):
    for column in range(columns):
      axis = axes[row, column]
      _show(axis, batch[column])
      if name in captions:
        axis.set_xlabel(captions[name][column], fontsize=7, labelpad=2)
    label = name if name not in reconstructions else name.upper()
    axes[row, 0].set_ylabel(label, fontsize=9)
  figure.tight_layout(pad=0.4)
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png")
  write_atomically(path, lambda file: file.write(buffer.getvalue()))


def _show(axis, image):
  axis.set_xticks([])
  axis.set_yticks([])
  if image.shape[-1] == 3:
    axis.imshow(np.nan_to_num(image, nan=0.5), interpolation="nearest")
  else:  # of other channels than three, the first is shown
    axis.imshow(image[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
