"""What is needed to repeat a run, besides its settings."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

import jaxdia

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "dm-pix", "ml_collections")


def manifest(**more: Any) -> dict[str, Any]:
  """Returns command, versions, device and time of this run, for manifest.json.

  Args:
    **more: what else belongs there.
  """
  devices = jax.local_devices()
  program = "/".join(pathlib.Path(sys.argv[0]).parts[-2:])  # as it is typed in the source tree
  device = dict.fromkeys((devices[0].platform, devices[0].device_kind))  # "cpu" is both
  return {
    "command": ["python", program, *sys.argv[1:]],
    "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "jaxdia": jaxdia.__version__,
    "commit": _commit(),
    "python": platform.python_version(),
    **{name: _version(name) for name in _PACKAGES},
    "platform": platform.platform(),
    "device": " ".join(device),
    "devices": len(devices),
    "cores": os.cpu_count(),
    **more,
  }


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def _commit() -> str | None:
  """Returns the commit of the source tree, with a "+" if files differ from it, or None."""
  folder = pathlib.Path(jaxdia.__file__).parent
  if not (folder.parent / ".git").exists():
    return None

  def git(*words):
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()

  try:
    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
  except (OSError, subprocess.CalledProcessError):
    return None
