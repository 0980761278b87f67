"""What all launchers share: flags and errors as a person wants to see them."""

import os
import sys
from collections.abc import Callable

import jax
import platformdirs
from absl import app, flags, logging
from ml_collections import config_flags

from jaxdia.core.errors import InputError

_MAX_CPU_DEVICES = 8


def launch(main: Callable[[], int | None], config: flags.FlagHolder | None = None) -> None:
  """Parses the flags and runs a program.

  What is compiled is kept in the user's cache folder for the next time, or where
  JAX_COMPILATION_CACHE_DIR says. Wrong input ends it with one line on standard
  error and exit code 2, an interruption from the keyboard with 130.

  Args:
    main: the program; it may return an exit code.
    config: the flag of its config file, if it takes one.
  """
  app.run(
    lambda argv: sys.exit(_guarded(main)), flags_parser=lambda argv: _parse_flags(argv, config)
  )


def default_workdir(config_flag: str = "config") -> str:
  """Returns runs/NAME for a config file NAME.py, with its argument if it has one."""
  path = config_flags.get_config_filename(flags.FLAGS[config_flag])
  name = path.replace("\\", "/").rsplit("/", 1)[-1]
  return "runs/" + name.replace(".py", "").replace(":", "_")


def _share_cpu() -> None:
  """Makes devices of CPU cores, unless the environment says how many.

  Trials on a core of their own are faster than ones that share all cores operation
  by operation. Each device holds a copy of the weights.
  """
  if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    return
  if "JAX_NUM_CPU_DEVICES" not in os.environ:
    jax.config.update("jax_num_cpu_devices", min(os.cpu_count() or 1, _MAX_CPU_DEVICES))


def _guarded(main) -> int:
  logging.set_verbosity(logging.WARNING)  # JAX tells of each backend that is not there
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", platformdirs.user_cache_dir("jaxdia"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  _share_cpu()
  try:
    return main() or 0
  except InputError as error:
    return _fail(error)
  except KeyboardInterrupt:
    print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
    return 130


def _fail(error: object) -> int:
  print(f"error: {error}", file=sys.stderr)
  return 2


def _parse_flags(argv: list[str], config: flags.FlagHolder | None) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
    if config is not None:
      config.value.to_dict()  # a file that was not found says so only when it is used
  except (flags.Error, KeyError, AttributeError, OSError, TypeError, ValueError) as error:
    sys.exit(_fail(_first_cause(error)))
  if len(rest) > 1:
    sys.exit(_fail(f"unknown arguments {rest[1:]}; settings are given as --config.FIELD=VALUE."))
  return rest


def _first_cause(error: Exception) -> str:
  """Returns what was wrong as one line, without the traceback that flags wrap it in."""
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]
  if isinstance(error, (KeyError, AttributeError)):  # of a field that the config lacks
    return "the config has no field " + ". ".join(str(error.args[0]).splitlines())
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  wrapped = [line for line in lines if "Error: " in line and not line.startswith("flag ")]
  return wrapped[-1].split("Error: ", 1)[1] if wrapped else " ".join(lines)
