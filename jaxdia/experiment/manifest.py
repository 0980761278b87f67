"""What is needed to repeat a run, besides its settings; and which calls took part in it."""

import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

import jaxdia
from jaxdia.core.files import write_json_lines

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "dm-pix", "ml_collections")


def manifest(**more: Any) -> dict[str, Any]:
  """Returns command, versions, device and time of this run, for manifest.json.

  Args:
    **more: what else belongs there.
  """
  program = sys.argv[0]
  if program.startswith("python -m "):  # of `jaxdia.__main__`
    called = program.split(" ")
  else:  # as it is typed in the source tree
    called = ["python", "/".join(pathlib.Path(program).parts[-2:])]
  return {
    "command": [*called, *sys.argv[1:]],
    "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "jaxdia": jaxdia.__version__,
    "commit": commit(),
    "python": platform.python_version(),
    **{name: importlib.metadata.version(name) for name in _PACKAGES},
    "platform": platform.platform(),
    "device": device_name(),
    "devices": jax.local_device_count(),
    "cores": os.cpu_count(),
    **more,
  }


def device_name() -> str:
  """Returns platform and kind of the devices."""
  first = jax.local_devices()[0]
  return " ".join(dict.fromkeys((first.platform, first.device_kind)))  # "cpu" is both


def add_session(workdir: pathlib.Path, **more: Any) -> int:
  """Notes in sessions.jsonl that this process goes on with what is in a work directory.

  A line is what `manifest` returns: an interrupted run may go on with another version, commit or
  device. manifest.json is that of the first session.

  Args:
    workdir: of an experiment or a study.
    **more: what else belongs there.

  Returns:
    The number of the session, from 0.
  """
  path = workdir / "sessions.jsonl"
  try:
    before = [json.loads(line) for line in path.read_text().splitlines()]
  except FileNotFoundError:
    before = []
  except (ValueError, RecursionError):  # damaged by hand: the numbers of the others are kept
    before = [{"damaged": line} for line in path.read_text(errors="replace").splitlines()]
  write_json_lines(path, [*before, {"session": len(before), **manifest(**more)}])
  return len(before)


@functools.cache
def commit() -> str | None:
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
