"""Transfers between host and devices, which `jax.transfer_guard` may forbid to the code around."""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator
from typing import ParamSpec, TypeVar

import jax

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def with_transfers(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
  """Lets a function move arrays, whatever guard it is called under.

  A user's guard is to find transfers of their own; those inside of a public function, of a rate
  or a count, they could not mend.

  Args:
    function: that returns when it is done; of an iterator see `each_with_transfers`.
  """

  @functools.wraps(function)
  def allowed(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
    with jax.transfer_guard("allow"):
      return function(*args, **kwargs)

  return allowed


def each_with_transfers(items: Generator[_Result, None, None]) -> Iterator[_Result]:
  """Yields what an iterator does, which may move arrays while it looks for the next one.

  Between two of them the guard is that of whoever takes them.

  Args:
    items: closed when this is.
  """
  with contextlib.closing(items):
    while True:
      with jax.transfer_guard("allow"):
        try:
          item = next(items)
        except StopIteration:
          return
      yield item
