"""What there is of memory and speed, and how much a process may compile."""

import contextlib
import ctypes
import os
import pathlib
import time

import jax
import jax.numpy as jnp

_MAX_CPU_DEVICES = 8
# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# What a device is taken to have where nobody tells.
_UNKNOWN_MEMORY = 8 * 2**30


def cores() -> int:
  """Returns how many cores this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def share_cpu() -> None:
  """Makes devices of CPU cores, unless the environment says how many, or JAX has begun.

  Trials on a core of their own are faster than ones that share all cores operation
  by operation. Each device holds a copy of the weights.
  """
  if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    return
  if "JAX_NUM_CPU_DEVICES" not in os.environ:
    with contextlib.suppress(RuntimeError):
      jax.config.update("jax_num_cpu_devices", min(cores(), _MAX_CPU_DEVICES))


def keep_compiled() -> None:
  """Keeps what is compiled in the user's cache folder, unless the environment says where."""
  import platformdirs  # of the extra `run`, as all that calls this

  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    with contextlib.suppress(RuntimeError):  # of a user who has no home there is no such folder
      jax.config.update("jax_compilation_cache_dir", platformdirs.user_cache_dir("jaxdia"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def keep_memory() -> None:
  """Lets glibc keep what is freed for the next time, as it does unless it was told otherwise.

  Dask tells the processes that it starts to give back all at once (MALLOC_TRIM_THRESHOLD_), and
  then each array of an iteration costs new pages.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
  if mallopt is not None:
    mallopt(_MMAP_THRESHOLD, 2**25)
    mallopt(_TRIM_THRESHOLD, 2**26)


def memory_of(device: jax.Device) -> float:
  """Returns the bytes of the memory that a device computes in; CPU devices share the machine's."""
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"]
  if device.platform != "cpu" or not hasattr(os, "sysconf"):
    return _UNKNOWN_MEMORY
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def matrix_product_rate() -> float:
  """Returns the operations a second of a large float32 matrix product on the first device."""
  size = 2048
  a = jax.random.normal(jax.random.key(0), (size, size), jnp.float32)
  product = jax.jit(lambda a: jnp.dot(a, a, precision="highest"))
  product(a).block_until_ready()
  times = []
  for _ in range(5):
    start = time.perf_counter()
    product(a).block_until_ready()
    times.append(time.perf_counter() - start)
  return 2 * size**3 / min(times)


def count_memory_maps() -> int:
  """Returns how many memory maps the process has; 0 where the system does not tell."""
  maps = pathlib.Path("/proc/self/maps")
  return maps.read_bytes().count(b"\n") if maps.exists() else 0


def forget_programs(most_maps: int = 30_000) -> None:
  """Drops what was compiled if it may soon be too much for Linux, which ends the process then.

  On a CPU each program takes memory maps of its own, a network with its closed forms some
  thousands, and a process may have 65,530. It takes memory too, of 24 small networks one after
  another 1.5 GB; glibc keeps what is given back, until it is told not to.

  Args:
    most_maps: with no more none are dropped.
  """
  if count_memory_maps() > most_maps:
    jax.clear_caches()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
      trim(0)
