"""What all launchers share: flags and errors as a person wants to see them."""

import errno
import os
import pathlib
import re
import sys
from collections.abc import Callable

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from jaxdia.core.errors import InputError, first_line, unknown
from jaxdia.core.files import UnwritableFile
from jaxdia.core.machine import keep_compiled, share_cpu

_NOBODY_READS = 141  # of a program that SIGPIPE ends
_CONFIGS = pathlib.Path(__file__).parent / "configs"


def launch(main: Callable[[], int | None], config: flags.FlagHolder | None = None) -> None:
  """Parses the flags and runs a program.

  What is compiled is kept in the user's cache folder for the next time, or where
  JAX_COMPILATION_CACHE_DIR says. Wrong input ends it with one line on standard
  error and exit code 2, an interruption from the keyboard with 130.

  Args:
    main: the program; it may return an exit code.
    config: the flag of its config file, if it takes one.
  """
  _mend_streams()
  # What --help shows, whichever file was started.
  sys.modules["__main__"].__doc__ = sys.modules[main.__module__].__doc__
  for flag in flags.FLAGS.get_flags_for_module(main.__module__):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  app.run(
    lambda argv: sys.exit(_guarded(main)), flags_parser=lambda argv: _parse_flags(argv, config)
  )


def config_names() -> list[str]:
  """Returns the names of the configs that are shipped with the package."""
  paths = sorted(_CONFIGS.rglob("*.py"))
  return [path.relative_to(_CONFIGS).as_posix().removesuffix(".py") for path in paths]


def _shipped(argument: str) -> str:
  """Returns an argument in which a config that is shipped has its path.

  A file of the given name comes first. So --config=quickstart and --config=configs/mlp.py:mnist
  mean the same in every folder.
  """
  match = re.fullmatch(r"(--?config=)([^:]*)(:.*)?", argument)
  if not match or pathlib.Path(match[2]).exists():
    return argument
  name = match[2].removeprefix("configs/").removesuffix(".py")
  if name not in config_names():
    raise unknown("config", match[2], config_names())
  return f"{match[1]}{_CONFIGS / name}.py{match[3] or ''}"


def default_workdir() -> str:
  """Returns runs/NAME for a config file NAME.py, with its argument if it has one."""
  path = config_flags.get_config_filename(flags.FLAGS["config"])
  name = path.replace("\\", "/").rsplit("/", 1)[-1]
  return "runs/" + name.replace(".py", "").replace(":", "_")


def cluster_flag() -> flags.FlagHolder[str | None]:
  """Returns the flag that names a cluster."""
  return flags.DEFINE_string(
    "cluster",
    None,
    "Run on other processes: local:N for N of this machine, or the address of a Dask scheduler,"
    " such as tcp://host:8786 (docs/clusters.md).",
  )


def where(cluster: flags.FlagHolder[str | None]) -> str | None:
  """Returns what a flag of `cluster_flag` says.

  This process computes nothing then, and leaves accelerators to those that do.

  Args:
    cluster: the flag.
  """
  if cluster.value:
    jax.config.update("jax_platforms", "cpu")
  return cluster.value or None


def _mend_streams() -> None:
  """Lets a run not end for what it says: to a closed stream, or in letters that it cannot write."""
  for name in ("stdout", "stderr"):
    stream = getattr(sys, name)
    if stream is None:
      setattr(sys, name, open(os.devnull, "w"))
    elif hasattr(stream, "reconfigure"):
      stream.reconfigure(errors="backslashreplace")


def _guarded(main) -> int:
  # JAX tells of each backend that is not there, and Orbax of files of which an error tells here.
  logging.set_verbosity(logging.ERROR)
  keep_compiled()
  share_cpu()
  try:
    code = main() or 0
    sys.stdout.flush()
    return code
  except InputError as error:
    return _fail(error)
  except BrokenPipeError:  # nobody reads on, as behind `| head`
    _forget_what_was_said()
    return _NOBODY_READS
  except UnwritableFile as error:
    return _fail(
      f"cannot write {error}. Make room, or the folder writable; the same command then goes on."
    )
  except OSError as error:
    if error.errno != errno.ENOSPC:  # it would be a fault of the program
      raise
    _forget_what_was_said()  # into a file on a disk that is full
    return _fail(f"cannot write what is said ({error}). Make room; the same command then goes on.")
  except KeyboardInterrupt:
    print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
    return 130


def _forget_what_was_said() -> None:
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: object) -> int:
  # A name of a file may hold line ends, and sequences that a terminal obeys.
  text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
  print(f"error: {text}", file=sys.stderr)
  return 2


def _parse_flags(argv: list[str], config: flags.FlagHolder | None) -> list[str]:
  logging.set_verbosity(logging.ERROR)  # what is wrong with a config is said in one line below
  sys.path.append(os.getcwd())  # where a network of the user's own may be
  try:
    rest = flags.FLAGS([argv[0], *map(_shipped, argv[1:])])
    if config is not None:
      config.value.to_dict()  # a file that was not found says so only when it is used
  except Exception as error:  # a config file is a program, and may raise anything
    sys.exit(_fail(_in_one_line(error)))
  if len(rest) > 1:
    sys.exit(_fail(f"unknown arguments {rest[1:]}; settings are given as --config.FIELD=VALUE."))
  return rest


def _in_one_line(error: BaseException) -> str:
  """Returns what was wrong, without the traceback that flags wrap it in."""
  root = error
  while root.__context__ is not None:
    root = root.__context__
  if isinstance(root, InputError):
    return str(root)
  if isinstance(error, KeyError):  # of a group that the config lacks
    return "the config has no field " + ". ".join(str(error.args[0]).splitlines())
  if error is root:
    return " ".join(line.strip() for line in str(error).splitlines())
  text, cause = first_line(error), first_line(root)
  return text if cause in text else f"{text} {type(root).__name__}: {cause}"
