"""Results as scalars for TensorBoard."""

import importlib.util
import pathlib

import numpy as np

from jaxdia.core.errors import InputError
from jaxdia.evaluation import ssim
from jaxdia.report.results import CellResults, read_study


def write_scalars(workdir: pathlib.Path) -> pathlib.Path:
  """Writes the results of an experiment or a study for TensorBoard.

  Of each attack there are the mean of each metric, and the SSIM of the first
  images while they formed, over the iterations.

  Args:
    workdir: of finished results.

  Returns:
    The folder that TensorBoard is to be pointed at.

  Raises:
    InputError: the package tensorboardX is not installed, or there are no results.
  """
  if importlib.util.find_spec("tensorboardX") is None:
    raise InputError(
      "scalars for TensorBoard need tensorboardX. Install it with"
      ' pip install "jaxdia[tensorboard]".'
    )
  study = read_study(workdir)
  folder = workdir / "tensorboard"
  for cell in study.done:
    for attack in cell.summary:
      _write(folder / cell.name / attack, cell, attack)
  return folder


def _write(folder: pathlib.Path, cell: CellResults, attack: str) -> None:
  from tensorboardX import SummaryWriter  # optional

  for old in folder.glob("events.*"):  # else TensorBoard would show each twice
    old.unlink()
  with SummaryWriter(str(folder)) as writer:
    for metric, statistics in cell.summary[attack].metrics.items():
      writer.add_scalar(f"mean/{metric}", statistics.mean, 0)
    recordings = cell.read_recordings()
    if attack not in recordings:
      return
    originals = cell.read_images()["originals"]
    for number, frames in enumerate(recordings[attack]):
      frames = frames.astype(np.float32) / 255
      scores = ssim(np.broadcast_to(originals[number], frames.shape), frames)
      for iteration, score in zip(recordings["iterations"], scores, strict=True):
        writer.add_scalar(f"ssim/image_{number}", float(score), int(iteration))
