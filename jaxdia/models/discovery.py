"""What is in a network, seen by tracing a call of it; kept for networks that are equal."""

import contextlib
import functools
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from jaxdia.core.errors import InputError, first_line
from jaxdia.core.precision import usual_promotion
from jaxdia.core.trees import Path, leaves_by_path
from jaxdia.core.types import Params
from jaxdia.models.hooks import Hooks, ignore_sites

if TYPE_CHECKING:
  from jaxdia.models.base import Network

# The shapes of inputs and outputs of each call of a layer.
_Calls = list[tuple[tuple[int, ...], tuple[int, ...]]]


class Discovery(NamedTuple):
  """What one call of a network showed.

  Attributes:
    sites: {name: (rate, mask shape)}, in the order of the call.
    dense: {path: shapes of each call}, without layers that cannot be tapped.
    convolutions: {path: (the layer by itself, shapes of one image in each call)}, likewise.
    inactive: names of dropout of a rate above 0 that is switched off.
    classifier: path of the dense layer whose outputs are the logits, but for what merely passes
      them on (see `_pass_on`), if one's are.
    is_shifted: whether a number an image is added to its outputs, as log_softmax does; the
      cross-entropy does not see that.
    logits: their shape and type.
    is_softmax: whether they are the outputs of a softmax.
  """

  sites: dict[str, tuple[float | None, tuple[int, ...]]]
  dense: dict[Path, _Calls]
  convolutions: dict[Path, tuple[Any, _Calls]]
  inactive: list[str]
  classifier: Path | None
  is_shifted: bool
  logits: Any
  is_softmax: bool


@functools.lru_cache
def params_shape(network: "Network") -> Params:
  """Returns the shapes of a network's parameters, as float32."""
  # Of one type, as the params of a run are: a mixture would be converted before its products.
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32),
    jax.eval_shape(network.init, jax.random.key(0)),
  )


@functools.lru_cache
def discover(network: "Network", batch_size: int) -> Discovery:
  """Traces a call of a network, and sees what is in it.

  Args:
    network: any.
    batch_size: of the images that it is called with.

  Returns:
    What the call showed; nothing of it may be changed, as others see it too.
  """
  sites: dict[str, tuple[float | None, tuple[int, ...]]] = {}
  dense: dict[Path, _Calls] = {}
  convolutions: dict[Path, tuple[Any, _Calls]] = {}
  hidden: set[Path] = set()
  inactive: list[str] = []
  products: list[tuple[Path, Any]] = []  # the outputs of dense layers

  def on_site(call):
    sites[call.name] = (call.rate, call.shape)
    return call.inputs

  def on_linear(layer, inputs, outputs, nested):
    if layer.convolution is None:
      dense.setdefault(layer.path, []).append((inputs.shape, outputs.shape))
      if not nested:
        products.append((layer.path, outputs))
    else:
      calls = convolutions.setdefault(layer.path, (layer.convolution, []))[1]
      calls.append((inputs.shape[-3:], outputs.shape[-3:]))
    if nested:  # what happens inside a transformation cannot be handed out of it
      hidden.add(layer.path)
    return outputs

  def traced(params, images):
    with usual_promotion():
      logits = network.call(params, images, Hooks(on_site, on_linear, inactive.append))
    handed_out = [outputs for _, outputs in products]
    products[:] = [(path, None) for path, _ in products]  # no tracer may outlive the trace
    return logits, handed_out

  shapes = params_shape(network)
  images = jax.ShapeDtypeStruct((batch_size, *network.image_shape), jnp.float32)
  program, (logits, handed_out) = jax.make_jaxpr(traced, return_shape=True)(shapes, images)
  # A kernel that is changed before its product, or used elsewhere too (tied weights), has a
  # gradient that taps do not tell.
  variables = dict(zip(leaves_by_path(shapes), program.jaxpr.invars, strict=False))
  calls_of = dense | {path: calls for path, (_, calls) in convolutions.items()}
  hidden |= {
    path
    for path, calls in calls_of.items()
    if _count_products(program.jaxpr, variables.get((*path, "kernel"))) != len(calls)
  }
  for found in (dense, convolutions):
    for path in hidden & set(found):
      del found[path]
  of_products = program.jaxpr.outvars[len(program.jaxpr.outvars) - len(handed_out) :]
  path_of = {id(v): path for v, (path, _) in zip(of_products, products, strict=True)}
  classifier, is_shifted = None, False
  if getattr(logits, "ndim", None) == 2:
    origin, is_shifted = _origin(program.jaxpr, program.jaxpr.outvars[0], path_of, logits.shape[1])
    if origin.aval.shape[-1:] == logits.shape[1:]:
      classifier = path_of.get(id(origin))
  is_softmax = _is_softmax(program.jaxpr)
  return Discovery(sites, dense, convolutions, inactive, classifier, is_shifted, logits, is_softmax)


# Operations whose outputs are their inputs, in another type or shape of the same size.
_PASSING = {"broadcast_in_dim", "convert_element_type", "copy", "name", "reduce_precision"}
_PASSING |= {"reshape", "sharding_constraint", "squeeze"}
_CALLS = {"checkpoint", "closed_call", "jit", "pjit", "remat2"}
# What leaves the other operand as it is.
_NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1}


def _origin(
  program: jex_core.Jaxpr, variable: Any, wanted: Container[int], num_classes: int
) -> tuple[Any, bool]:
  """Follows a variable back through operations that pass on the outputs of a layer.

  Args:
    program: in which it is computed.
    variable: where to start.
    wanted: ids of variables at which to stop.
    num_classes: length of the last axis, that of the classes.

  Returns:
    The first variable that no such operation made, and whether a number for all classes was added
    on the way.
  """
  made_by = {id(output): equation for equation in program.eqns for output in equation.outvars}
  is_shifted = False
  while id(variable) not in wanted and id(variable) in made_by:
    equation = made_by[id(variable)]
    inner = _inner_programs(equation)
    if equation.primitive.name in _CALLS and len(inner) == 1:
      place = [id(output) for output in equation.outvars].index(id(variable))
      start = inner[0].outvars[place]
      origin, shifts = _origin(inner[0], start, (), num_classes)
      places = [i for i, value in enumerate(inner[0].invars) if value is origin]
      before = equation.invars[places[0]] if places else None
    else:
      before, shifts = _pass_on(equation, made_by, num_classes)
    if before is None or _size(before) != _size(variable):
      break
    variable, is_shifted = before, is_shifted or shifts
  return variable, is_shifted


def _size(variable: Any) -> int:
  return math.prod(variable.aval.shape)


def _pass_on(equation, made_by: Mapping[int, Any], num_classes: int) -> tuple[Any, bool]:
  """Returns which operand an operation passes on, None if none, and whether it is shifted."""
  name, operands = equation.primitive.name, equation.invars
  if name in _PASSING:
    is_float = jnp.issubdtype(operands[0].aval.dtype, jnp.floating)
    return (operands[0] if is_float else None), False
  if name not in _NEUTRAL or len(operands) != 2:
    return None, False
  for i, j in ((0, 1), (1, 0)) if name in ("add", "mul") else ((0, 1),):
    other = operands[j]
    if isinstance(other, jex_core.Literal) and np.all(other.val == _NEUTRAL[name]):
      return operands[i], False
    if name in ("add", "sub") and operands[i].aval.shape[-1:] == (num_classes,):
      if _is_same_for_all_classes(other, made_by):
        return operands[i], True
  return None, False


def _is_same_for_all_classes(operand, made_by: Mapping[int, Any]) -> bool:
  shape = operand.aval.shape
  if shape[-1:] in ((), (1,)):
    return True
  equation = made_by.get(id(operand))
  if equation is None or equation.primitive.name != "broadcast_in_dim":
    return False
  axes, before = equation.params["broadcast_dimensions"], equation.invars[0].aval.shape
  return len(shape) - 1 not in axes or before[axes.index(len(shape) - 1)] == 1


def _is_softmax(program: jex_core.Jaxpr) -> bool:
  """Returns whether the first output of a program is a quotient of exponentials."""
  made_by = {id(output): equation for equation in program.eqns for output in equation.outvars}
  last = made_by.get(id(program.outvars[0]))
  if last is None:
    return False
  if last.primitive.name == "div":
    numerator = made_by.get(id(last.invars[0]))
    return numerator is not None and numerator.primitive.name == "exp"
  return any(_is_softmax(inner) for inner in _inner_programs(last))


def _inner_programs(equation) -> list[jex_core.Jaxpr]:
  kinds = (jex_core.ClosedJaxpr, jex_core.Jaxpr)
  values = jax.tree.leaves(
    list(equation.params.values()), is_leaf=lambda value: isinstance(value, kinds)
  )
  inner = [value for value in values if isinstance(value, kinds)]
  return [p.jaxpr if isinstance(p, jex_core.ClosedJaxpr) else p for p in inner]


def _count_products(program: jex_core.Jaxpr, variable) -> float:
  """Returns how many products of a program use a variable; NaN if anything else does.

  What merely hands a variable on to an inner program, converts or transposes it, is followed, as
  libraries lay out their kernels in several ways.
  """
  count = math.nan if any(output is variable for output in program.outvars) else 0
  for equation in program.eqns:
    places = [i for i, value in enumerate(equation.invars) if value is variable]
    inner = _inner_programs(equation)
    if not places:
      continue
    if equation.primitive.name in ("dot_general", "conv_general_dilated"):
      count += len(places)
    elif equation.primitive.name in ("convert_element_type", "transpose"):
      count += _count_products(program, equation.outvars[0])
    elif len(inner) == 1 and len(inner[0].invars) == len(equation.invars):
      count += sum(_count_products(inner[0], inner[0].invars[i]) for i in places)
    else:
      count = math.nan
  return count


@contextlib.contextmanager
def naming_failures(network: "Network", given: str = "1 and with 2 images") -> Iterator[None]:
  """Lets an error inside a user's module be an InputError that says how the module was called.

  Args:
    network: of the module.
    given: with how many images.
  """
  try:
    yield
  except InputError:
    raise
  except Exception as error:  # of whatever the module does
    raise InputError(
      f"{network.name} ended in a {type(error).__name__}: {first_line(error)} It was called with"
      f" {given} of {network.image_shape} as JAX traces it, without values; expected a"
      " module that computes any number of such images by its library alone. Check image_shape and"
      " the arguments of its call."
    ) from error


def check_params(network: "Network", params: Params) -> None:
  """Refuses params that are not those of a network.

  Args:
    network: any.
    params: of it, whose arrays may be traced.

  Raises:
    InputError: a leaf is missing, or there is one more, or it is of another shape; the message
      names it.
  """
  found, expected = leaves_by_path(params), leaves_by_path(params_shape(network))
  for path in [path for path in expected if path not in found]:
    within = [other[0] for other in found if other[1:] == path]
    mend = f"Pass params[{within[0]!r}]." if within else "They may be of another network."
    raise InputError(
      f"the params lack the leaf {'/'.join(path)!r}, which {network.name} has; expected a tree as"
      f" model.init(key) returns it. {mend}"
    )
  for path in [path for path in found if path not in expected]:
    raise InputError(
      f"the params have the leaf {'/'.join(path)!r}, which {network.name} lacks; expected a tree as"
      " model.init(key) returns it. They may be of another network."
    )
  for path, leaf in expected.items():
    name = "/".join(path)
    if np.shape(found[path]) != leaf.shape:
      raise InputError(
        f"the leaf {name!r} of the params has shape {np.shape(found[path])}; expected {leaf.shape}"
        f" as {network.name} has it. They may be of another network."
      )


def check_randomness(network: "Network") -> None:
  """Refuses a network that draws other random numbers than the masks of its sites.

  It counts the random numbers in the program in which the library draws, loops included: dropout
  inside a scan draws anew in each turn, which one mask cannot stand for, and a network may draw
  by itself what is no dropout.

  Args:
    network: whose library draws with JAX.

  Raises:
    InputError: it does; the message says how many.
  """
  images = jax.ShapeDtypeStruct((2, *network.image_shape), jnp.float32)

  def draw(call):
    return call.inputs * call.draw().astype(call.inputs.dtype)

  def drawing(params, images):
    with usual_promotion():
      return network.call(params, images, Hooks(draw))

  program = jax.make_jaxpr(drawing)(params_shape(network), images)
  sites = discover(network, 2).sites
  drawn = count_random_numbers(program.jaxpr)
  explicit = sum(math.prod(shape) for _, shape in sites.values())
  if drawn != explicit:
    raise InputError(
      f"{network.name} draws {drawn} random numbers for 2 images, but its dropout sites"
      f" ({', '.join(sites) or 'none'}) account for {explicit}. What else draws (dropout under a"
      " scan or vmap such as nn.scan, stochastic depth, noise) cannot be made an explicit mask:"
      " unroll the loop, or turn that part off."
    )


def check_is_on(network: "Network", off: Sequence[str], mend: str) -> None:
  """Refuses a network of which all dropout is switched off, as it was hardly meant so.

  Args:
    network: whose dropout may be.
    off: names of what is switched off, such as `Discovery.inactive`.
    mend: what the message says to do.

  Raises:
    InputError: all of it is.
  """
  if off and not discover(network, 2).sites:
    raise InputError(
      f"all dropout of {network.name} ({', '.join(off)}) is switched off. {mend}, or give it rate"
      " 0."
    )


def check_no_randomness(network: "Network", mend: str) -> None:
  """Refuses a network that draws random numbers with its dropout switched off.

  Args:
    network: whose dropout draws none with JAX by itself.
    mend: what the message says to do.

  Raises:
    InputError: it does; the message says how many.
  """
  images = jax.ShapeDtypeStruct((2, *network.image_shape), jnp.float32)

  def call(params, images):
    with usual_promotion():
      return network.call(params, images, Hooks(ignore_sites))

  program = jax.make_jaxpr(call)(params_shape(network), images)
  if drawn := count_random_numbers(program.jaxpr):
    raise InputError(
      f"{network.name} draws {drawn} random numbers for 2 images besides those of its dropout"
      f" ({', '.join(discover(network, 2).sites) or 'none'}), which cannot be made an explicit"
      f" mask. {mend}"
    )


def count_random_numbers(program: jex_core.Jaxpr) -> float:
  """Returns how many random numbers a program draws, those of all turns of its loops."""
  count = 0
  for equation in program.eqns:
    if equation.primitive.name == "random_bits":
      # Under nn.vmap there is a batch of keys, which the parameter "shape" leaves out.
      drawn = cast(jax.ShapeDtypeStruct, equation.outvars[0].aval)
      count += math.prod(drawn.shape)
      continue
    turns = {"scan": equation.params.get("length"), "while": math.inf}
    for inner in _inner_programs(equation):
      if (drawn := count_random_numbers(inner)) > 0:
        count += drawn * turns.get(equation.primitive.name, 1)
  return count
