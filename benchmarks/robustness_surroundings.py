"""Part of `robustness.py`: the quickstart where something is missing or odd."""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import pty
import shutil
import stat
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Mapping, Sequence

from robustness_runs import ROOT, Check, differences, finish, leftovers

_ODD = "Versuch ä 数据 1"
_LIMIT_SECONDS = 300
_ARGUMENTS = ["--config.attack.name=dia", "--config.attack.max_iterations=20"]
_ARGUMENTS += ["--config.data.count=2"]
# Root may write anywhere, unless it gives that up.
_WITHOUT_RIGHTS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
# A user that has no name and no home, and may read this tree wherever it lies.
_NOBODY = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
_NOBODY += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
_LOCALES = {"de_DE": "ISO-8859-1", "tr_TR": "UTF-8"}


@dataclasses.dataclass(frozen=True)
class _Surroundings:
  """Where a run is started.

  Attributes:
    environment: variables that are set, or left out if None.
    before: what stands before the command.
    after: what a shell does with its streams.
    where: the current folder.
    workdir: of the run.
    missing: why it cannot be tried; empty if it can.
    columns: of the terminal that it runs in; 0 for none.
    may_end: exit codes with which it may stop, if the same command then goes on elsewhere.
    tree: where the source is.
  """

  environment: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
  before: Sequence[str] = ()
  after: str = ""
  where: pathlib.Path = ROOT
  workdir: str = ""
  missing: str = ""
  columns: int = 0
  may_end: tuple[int, ...] = ()
  tree: pathlib.Path = ROOT


def run(folder: pathlib.Path, seed: int, number: int) -> Iterator[Check]:
  """Runs the quickstart in each of the surroundings, and compares what came of it.

  Args:
    folder: that `set_up` has filled.
    seed: not used, as nothing is drawn.
    number: not used.

  Yields:
    A check for each.
  """
  del seed, number
  alone = folder / "plain"
  code, text = _start(_Surroundings(workdir=str(alone)))
  if code:
    yield Check("the quickstart", "as it is", [f"it ended with {code}: {text}"])
    return
  for name, one in _all(folder).items():
    what, case = name.split(": ")
    if one.missing:
      yield Check(what, case, skipped=one.missing)
      continue
    workdir = one.workdir or str(folder / "runs" / str(abs(hash(name))))
    one = dataclasses.replace(one, workdir=workdir)
    code, text = _start(one)
    faults = [f"it said {text[-600:]!r}"] if "Traceback" in text or "Exception" in text else []
    if code in one.may_end:
      code, text = _start(_Surroundings(workdir=workdir, where=one.where))
    if code:
      faults.append(f"it ended with {code} and said {text[-600:]!r}")
    else:
      faults += differences(alone, one.where / workdir) + leftovers(one.where / workdir)
    yield Check(what, case, faults)


def _start(one: _Surroundings) -> tuple[int, str]:
  """Runs the quickstart; returns its exit code, and all that it said where that can be read."""
  environment = dict(os.environ) | {"PYTHONPATH": str(one.tree)} | one.environment
  environment = {name: value for name, value in environment.items() if value is not None}
  words = [sys.executable, str(one.tree / "launch" / "attack.py")]
  words += ["--config=quickstart", *_ARGUMENTS, f"--workdir={one.workdir}"]
  command = [*one.before, *words]
  if one.after:
    command = ["bash", "-c", f'set -o pipefail; "$@" {one.after}', "bash", *command]
  if one.columns:
    return _in_a_terminal(command, environment, one)
  process = subprocess.Popen(
    command,
    cwd=one.where,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    start_new_session=True,
  )
  return finish(process, _LIMIT_SECONDS)


def _in_a_terminal(command, environment, one: _Surroundings) -> tuple[int, str]:
  """Runs a command in a terminal of its own."""
  ours, theirs = pty.openpty()
  fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, one.columns, 0, 0))
  process = subprocess.Popen(
    command, cwd=one.where, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
  )
  os.close(theirs)
  said = b""
  with contextlib.suppress(OSError):  # of a terminal that nobody has open any more
    while data := os.read(ours, 65536):
      said += data
  os.close(ours)
  return process.wait(_LIMIT_SECONDS), said.decode(errors="replace")


def _all(folder: pathlib.Path) -> dict[str, _Surroundings]:
  """Returns all surroundings by name: the row of the table, and which one."""
  is_root = os.geteuid() == 0
  setpriv = "" if shutil.which("setpriv") else "there is no setpriv"
  unnamed = setpriv or ("" if is_root else "only root can become another user")
  plain = ["env"] if not is_root else _WITHOUT_RIGHTS
  no_rights = setpriv if is_root else ""

  read_only, file, odd = folder / "read_only", folder / "a_file", folder / _ODD
  read_only.mkdir()
  read_only.chmod(stat.S_IRUSR | stat.S_IXUSR)
  file.write_text("")
  (odd / "tree").mkdir(parents=True)
  for part in ("launch", "jaxdia", "configs"):
    shutil.copytree(ROOT / part, odd / "tree" / part)
  (folder / "runs").mkdir()
  (folder / "runs").chmod(0o777)
  folder.chmod(0o755)
  no_cache = {"JAX_COMPILATION_CACHE_DIR": None}
  ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LANG": None, "LC_CTYPE": None}
  home = {**no_cache, "XDG_CACHE_HOME": None}

  return {
    "cache: a folder that cannot be written": _Surroundings(
      {**no_cache, "XDG_CACHE_HOME": str(read_only)}, plain, missing=no_rights
    ),
    "cache: JAX's own, that cannot be written": _Surroundings(
      {"JAX_COMPILATION_CACHE_DIR": str(read_only)}, plain, missing=no_rights
    ),
    "cache: a file in its place": _Surroundings({**no_cache, "XDG_CACHE_HOME": str(file)}),
    "home: no HOME": _Surroundings({"HOME": None}),
    "home: a HOME that is not there": _Surroundings({**home, "HOME": f"{file}/none"}),
    "home: no HOME, and a user without a name": _Surroundings(
      {**home, "HOME": None, "USER": None, "LOGNAME": None},
      _NOBODY,
      missing=unnamed,
      where=folder / "runs",
    ),
    "network: none": _without_network(),
    **{
      f"locale: {name}, Python's UTF-8 mode off": _Surroundings({**ascii_only, "LC_ALL": name})
      for name in ("C", "POSIX")
    },
    **{f"locale: {n}.{e}": _locale(folder, n, e, ascii_only) for n, e in _LOCALES.items()},
    "paths: current folder and work directory with spaces, umlauts and Chinese": _Surroundings(
      where=odd, workdir=f"Läufe 数/{_ODD}"
    ),
    "paths: source tree likewise": _Surroundings(tree=odd / "tree", where=odd / "tree"),
    "paths: work directory likewise, in the locale C": _Surroundings(
      {**ascii_only, "LC_ALL": "C"}, where=odd, workdir=f"C/{_ODD}"
    ),
    "temporary files: a TMPDIR that is not there": _Surroundings({"TMPDIR": f"{folder}/none"}),
    "programs: an empty PATH": _Surroundings({"PATH": ""}),
    "streams: stdout into head -n 1": _Surroundings(after="| head -n 1", may_end=(141,)),
    "streams: stdout is closed": _Surroundings(after=">&-"),
    "streams: stderr is closed": _Surroundings(after="2>&-"),
    "streams: stdin is closed": _Surroundings(after="<&-"),
    "streams: stdout is a full disk": _Surroundings(after="> /dev/full", may_end=(2,)),
    "terminal: of 40 columns": _Surroundings({"COLUMNS": None}, columns=40),
    "terminal: of one column": _Surroundings({"COLUMNS": None}, columns=1),
    "terminal: that can do nothing": _Surroundings({"TERM": "dumb", "COLUMNS": None}, columns=80),
  }


def _without_network() -> _Surroundings:
  """Returns surroundings in which only this process is, if that is allowed."""
  for words in (["unshare", "-n"], ["unshare", "-rn"]):
    with contextlib.suppress(OSError):
      if subprocess.run([*words, "true"], capture_output=True).returncode == 0:
        return _Surroundings(before=words)
  return _Surroundings(missing="no right to leave the network (unshare -n)")


def _locale(folder: pathlib.Path, name: str, encoding: str, environment) -> _Surroundings:
  """Returns surroundings with a locale, which is made for them."""
  path = folder / "locales" / f"{name}.{encoding}"
  path.parent.mkdir(exist_ok=True)
  try:
    made = subprocess.run(
      ["localedef", "-i", name, "-f", encoding, str(path)], capture_output=True, text=True
    )
  except FileNotFoundError:
    return _Surroundings(missing="there is no localedef")
  if not path.exists():
    return _Surroundings(missing=f"localedef cannot make it ({made.stderr.strip()[:80]})")
  chosen = {"LOCPATH": str(path.parent), "LC_ALL": path.name}
  return _Surroundings({**environment, **chosen})
