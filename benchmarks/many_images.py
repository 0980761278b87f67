"""Time, memory and disk of an experiment with very many images.

python benchmarks/many_images.py

Each row is the closed form on the MLP and as many MNIST images, by the launcher: how long it takes,
the largest memory of its process, the disk that its folder takes; the same command again, which
finds all finished; and the report, its size, and how long a browser takes until it is there, if
chromium is installed. The images are the 20 of the samples, turned and moved a little by chance.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import flags
from measuring import Table, about_device
from scipy import ndimage

from jaxdia import data
from jaxdia.command_line import launch

_COUNTS = flags.DEFINE_list("counts", ["100", "1000", "10000"], "Numbers of images.")
_OUT = flags.DEFINE_string("out", None, "JSON file for the rows.")

_ROOT = pathlib.Path(__file__).parent.parent


def main() -> None:
  """Measures all rows and prints them as a Markdown table."""
  columns = {
    "images": ",d", "seconds": ".1f", "ms an image": ".0f", "memory MiB": ",.0f",
    "disk MiB": ",.1f", "again s": ".1f", "again MiB": ",.0f", "report s": ".1f",
    "report MiB": ".2f", "page s": ".1f",
  }  # fmt: skip
  table = Table(about_device(), columns)
  with tempfile.TemporaryDirectory() as folder:
    _warm(pathlib.Path(folder))
    for count in map(int, _COUNTS.value):
      workdir = pathlib.Path(folder) / str(count)
      path = _make_images(pathlib.Path(folder) / f"{count}.npz", count)
      seconds, memory = _attack(path, count, workdir)
      again, again_memory = _attack(path, count, workdir)
      report, _ = _run("launch/report.py", f"--workdir={workdir}")
      page = workdir / "report.html"
      table.add(
        **{
          "images": count,
          "seconds": seconds,
          "ms an image": 1e3 * seconds / count,
          "memory MiB": memory,
          "disk MiB": sum(p.stat().st_blocks for p in workdir.rglob("*")) * 512 / 2**20,
          "again s": again,
          "again MiB": again_memory,
          "report s": report,
          "report MiB": page.stat().st_size / 2**20,
          "page s": _load(page) - _load(None),
        }
      )
      shutil.rmtree(workdir)
  table.write(_OUT.value)


def _warm(folder: pathlib.Path) -> None:
  """Lets what is compiled be in the cache, as for anyone's second run."""
  _attack(_make_images(folder / "warm.npz", 2), 2, folder / "warm")


def _make_images(path: pathlib.Path, count: int) -> pathlib.Path:
  """Writes images."""
  victims, rng = data.load("samples:mnist", 20), np.random.default_rng(0)
  images = []
  for number in range(count):
    image = ndimage.rotate(
      victims.images[number % 20, ..., 0], rng.uniform(-25, 25), reshape=False, order=1
    )
    images.append(np.clip(ndimage.shift(image, rng.uniform(-3, 3, 2), order=1), 0, 1))
  pixels = np.round(255 * np.stack(images)[..., None]).astype(np.uint8)
  np.savez(path, images=pixels, labels=np.resize(victims.labels, count))
  return path


def _attack(path: pathlib.Path, count: int, workdir: pathlib.Path) -> tuple[float, float]:
  return _run(
    "launch/attack.py",
    "--config=configs/mlp.py:mnist",
    "--config.attack.name=closed_form",
    f"--config.data.source=npz:{path}",
    "--config.data.num_classes=10",
    "--config.data.statistics=mnist",
    f"--config.data.count={count}",
    f"--workdir={workdir}",
  )


def _run(*arguments: str) -> tuple[float, float]:
  """Returns seconds that a command takes, and the most memory that it has, in MiB."""
  start = time.perf_counter()
  process = subprocess.Popen(
    [sys.executable, *arguments], cwd=_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  _, status, usage = os.wait4(process.pid, 0)
  if status:
    raise RuntimeError(f"{arguments[0]} ended with {os.waitstatus_to_exitcode(status)}")
  return time.perf_counter() - start, usage.ru_maxrss / 2**10


def _load(page: pathlib.Path | None) -> float:
  """Returns seconds until a browser shows a page, or an empty one; NaN without a browser."""
  browser = shutil.which("chromium")
  if browser is None:
    return float("nan")
  address = "about:blank" if page is None else page.as_uri()
  options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
  times = []
  for _ in range(3):
    start = time.perf_counter()
    subprocess.run([browser, *options, "--dump-dom", address], capture_output=True, check=True)
    times.append(time.perf_counter() - start)
  return min(times)


if __name__ == "__main__":
  launch(main)
