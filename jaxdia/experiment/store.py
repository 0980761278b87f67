"""The work directory of an experiment: whose it is, and what lies in it.

`config.json` says what identifies the run: all settings that change results, and in its group
`engine` the number of devices, `matching`, `convolve`, and for each attack the number of lanes.
With these the numbers are exactly the same; with others they are equal but for rounding, which a
long search amplifies. They are fixed by the first session and kept by those that go on, in either
precision: other lanes or other ways to compute are refused, and of more devices only so many are
used. Where the lanes did not fit into the memory, `halved` says in how many a run goes on, without
trying the others again. Only of fewer devices, or others, nothing can be kept; that is said, and
each row of the results tells by its `session` what made it.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import msgspec

from jaxdia.core.errors import InputError
from jaxdia.core.files import append_json_lines, write_json, write_json_lines
from jaxdia.experiment.config import EngineSettings
from jaxdia.experiment.lock import Lock, cannot_write
from jaxdia.experiment.manifest import add_session, device_name, manifest
from jaxdia.experiment.schema import Row, decode


class Devices(NamedTuple):
  """What a process computes on.

  Attributes:
    name: platform and kind.
    count: how many there are.
  """

  name: str
  count: int

  @classmethod
  def of_this_process(cls) -> "Devices":
    """Returns what this process computes on."""
    return cls(device_name(), len(jax.local_devices()))


class Store:
  """A work directory.

  Attributes:
    session: number of the session that this process is in the directory, from 0.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    config: dict[str, Any],
    engine: EngineSettings,
    devices: Devices | None = None,
    session: int | None = None,
  ):
    """Looks whether the directory is free or this experiment's; nothing is written.

    Args:
      workdir: which need not exist.
      config: all that changes results, for config.json; without the engine.
      engine: as it was asked for.
      devices: that the trials run on; this process's if None.
      session: that another process gave, which keeps the results; a new one if None.

    Raises:
      InputError: the directory is another's, or cannot be used.
    """
    self._workdir = workdir
    self._config = config
    self._asked = engine
    self._lock = Lock(workdir)
    self._given = devices or Devices.of_this_process()
    self._began = session is not None
    self.session = session or 0
    self._engine = self._check()

  def path(self, *parts: str) -> pathlib.Path:
    """Returns where something lies in the directory.

    Args:
      *parts: of the path inside.
    """
    return self._workdir.joinpath(*parts)

  def open(self) -> None:
    """Locks the directory, and writes what it is about.

    Raises:
      InputError: another process has it, or it cannot be written.
    """
    try:
      self._lock.acquire()
      self._engine = self._check()  # it may have become another's meanwhile
      self.path("trials").mkdir(parents=True, exist_ok=True)
      self._write_config()
    except OSError as error:
      raise cannot_write(self._workdir, error) from error

  def close(self) -> None:
    """Gives the directory back to others."""
    self._lock.release()

  def start(self, attack: str, lanes: int, asked: int, say: Callable[[str], None]) -> None:
    """Notes that this process is going to run trials of an attack.

    Args:
      attack: its name.
      lanes: in how many a device it is run.
      asked: in how many it would be run if it was not begun before.
      say: called with a line if it runs on other devices than the first session.

    Raises:
      InputError: other lanes, or another `matching` or `convolve`, are asked for than it was begun
        with.
    """
    fixed = self._engine
    # What was begun before there were products had convolutions as they are.
    ways = [(x, fixed.get(x, "native"), getattr(self._asked, x)) for x in ("matching", "convolve")]
    for what, there, here in [*ways, ("lanes", lanes, asked)]:
      if there != here:
        raise InputError(
          f"the work directory {self._workdir} was begun with config.engine.{what}={there}; with"
          f" {here} it would end with other numbers, as rounding grows in a long search. Set it"
          f" to {there}, or choose another --workdir."
        )
    if not self._began:
      there = f"{fixed['devices']} devices ({fixed['device']})"
      here = f"{self._used.count} devices ({self._used.name})"
      if there != here:
        say(
          f"begun on {there}, going on on {here}: results are equal but for rounding, which a long"
          " search amplifies"
        )
    if lanes and self.lanes(attack) != lanes:
      fixed["lanes"][attack] = lanes
      self._write_config()
    if not self._began:
      self._begin_session()

  def _begin_session(self) -> None:
    path = self.path("manifest.json")
    if not path.exists():
      facts = {name: self._config[name] for name in ("seed", "precision")}
      write_json(path, manifest(**facts, data_sha256=self._config["data"]["sha256"]))
    lanes = self._engine["lanes"] | self._engine.get("halved", {})
    device, count = self._used
    used = vars(self._asked) | {"device": device, "devices": count, "lanes": lanes}
    self.session = add_session(self._workdir, engine=used)
    self._began = True

  @property
  def _used(self) -> Devices:
    """Of those that there are, as many as the first session had."""
    return self._given._replace(count=min(self._given.count, self._engine["devices"]))

  @property
  def devices(self) -> list[jax.Device]:
    """Those that the trials may run on: as many as the first session had, if there are."""
    return jax.local_devices()[: self._engine["devices"]]

  def lanes(self, attack: str) -> int | None:
    """Returns the lanes a device in which an attack was begun; None if it was not.

    Args:
      attack: its name.
    """
    return self._engine["lanes"].get(attack)

  def halved(self, attack: str) -> int | None:
    """Returns in how many lanes a device an attack goes on since memory was short; None if never.

    Args:
      attack: its name.
    """
    return self._engine.get("halved", {}).get(attack)

  def note_halved(self, attack: str, lanes: int) -> None:
    """Notes that an attack has gone on in fewer lanes, so that it is taken up in these.

    Args:
      attack: its name.
      lanes: on each device.
    """
    if self.halved(attack) != lanes:
      self._engine.setdefault("halved", {})[attack] = lanes
      self._write_config()

  def read_results(self) -> list[Row]:
    """Reads what is whole of results.jsonl."""
    rows, path = [], self.path("results.jsonl")
    for line in path.read_bytes().splitlines() if path.exists() else ():
      with contextlib.suppress(msgspec.DecodeError):
        rows.append(Row.from_json(decode(line)))
    return rows

  def write_results(self, rows: list[dict[str, Any]]) -> None:
    """Writes results.jsonl anew.

    Args:
      rows: all that there are, in order.
    """
    write_json_lines(self.path("results.jsonl"), rows)

  def append_results(self, rows: Iterable[dict[str, Any]]) -> None:
    """Adds rows to results.jsonl.

    Args:
      rows: of images that are finished now.
    """
    append_json_lines(self.path("results.jsonl"), rows)

  def _write_config(self) -> None:
    write_json(self.path("config.json"), self._config | {"engine": self._engine})

  def _check(self) -> dict[str, Any]:
    """Returns what is fixed of the engine, by the first session or by this one."""
    workdir, path = self._workdir, self.path("config.json")
    try:
      if workdir.exists() and not workdir.is_dir():
        raise InputError(f"the work directory {workdir} is a file. Choose another --workdir.")
      if self.path("study.json").exists():
        raise InputError(f"the work directory {workdir} holds a study. Choose another --workdir.")
      found = path.exists()
      there = json.loads(path.read_text()) if found else {}
      if not isinstance(there, dict):
        raise ValueError(f"{path} holds no settings")
    except InputError:
      raise
    except (OSError, ValueError, RecursionError) as error:
      raise InputError(
        f"cannot use the work directory {workdir} ({error}). Choose another --workdir."
      ) from error
    if not found:
      return {
        "matching": self._asked.matching,
        "convolve": self._asked.convolve,
        "devices": self._given.count,
        "device": self._given.name,
        "lanes": {},
      }
    engine = there.pop("engine", None)
    differing = list(differences(there, json.loads(json.dumps(self._config))))
    if not differing and not (isinstance(engine, dict) and isinstance(engine.get("lanes"), dict)):
      differing = [("engine", repr(engine), "of another version of jaxdia")]
    if differing:
      name, old, new = differing[0]
      more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
      raise InputError(
        f"the work directory {workdir} holds another experiment: its {name} is {old}, this one's"
        f" is {new}{more}. Choose another --workdir, or delete that one."
      )
    return engine


def differences(there: Any, here: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
  """Yields the names of fields that differ, with their values, deep in two JSON values.

  Args:
    there: the one value.
    here: the other.
    name: of the group that they are in.
  """
  if isinstance(there, dict) or isinstance(here, dict):
    there, here = (x if isinstance(x, dict) else {} for x in (there, here))
    for key in sorted(set(there) | set(here)):
      yield from differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
  elif there != here:
    yield name, repr(there), repr(here)
