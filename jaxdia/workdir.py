"""Which experiment a work directory belongs to."""

import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from jaxdia import data
from jaxdia.core.errors import InputError


def digest(victims: data.Victims) -> str:
  """Returns what tells apart victims that come from the same source, as after a file changed.

  Args:
    victims: images and labels.
  """
  sha = hashlib.sha256()
  for array in (victims.images, victims.labels, np.asarray(victims.num_classes)):
    sha.update(np.ascontiguousarray(array).tobytes())
  return sha.hexdigest()


def check_workdir(workdir: pathlib.Path, here: dict[str, Any]) -> None:
  """Refuses a work directory that belongs to another experiment.

  Args:
    workdir: which need not exist.
    here: what this experiment would write into its config.json.

  Raises:
    InputError: it is another's, or cannot be used.
  """
  path = workdir / "config.json"
  try:
    if workdir.exists() and not workdir.is_dir():
      raise InputError(f"the work directory {workdir} is a file. Choose another --workdir.")
    if (workdir / "study.json").exists():
      raise InputError(f"the work directory {workdir} holds a study. Choose another --workdir.")
    if not path.exists():
      return
    there = json.loads(path.read_text())
    if not isinstance(there, dict):
      raise ValueError(f"{path} holds no settings")
  except InputError:
    raise
  except (OSError, ValueError) as error:
    raise InputError(
      f"cannot use the work directory {workdir} ({error}). Choose another --workdir."
    ) from error
  # The engine's settings change no result.
  there, here = ({k: v for k, v in config.items() if k != "engine"} for config in (there, here))
  differing = list(_differences(there, json.loads(json.dumps(here))))
  if differing:
    name, old, new = differing[0]
    more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
    raise InputError(
      f"the work directory {workdir} holds another experiment: its {name} is {old}, this one's"
      f" is {new}{more}. Choose another --workdir, or delete that one."
    )


def _differences(there: Any, here: Any, name: str = ""):
  if isinstance(there, dict) or isinstance(here, dict):
    there, here = (x if isinstance(x, dict) else {} for x in (there, here))
    for key in sorted(set(there) | set(here)):
      yield from _differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
  elif there != here:
    yield name, repr(there), repr(here)
