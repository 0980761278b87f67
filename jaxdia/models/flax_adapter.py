"""Makes the dropout of an ordinary Flax Linen module explicit.

Flax lets a caller intercept the method calls of a module and of all that it
contains. The adapter intercepts `nn.Dropout`, and the attention weights of
`nn.MultiHeadDotProductAttention`, and puts a mask that it was handed where Flax
would draw one. So a user's module needs no rewriting.
"""

import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import errors as flax_errors
from flax import linen as nn
from jax.extend import core as jex_core

from jaxdia.core.errors import InputError
from jaxdia.core.types import Images, Key, Logits, Masks, Params
from jaxdia.models.base import (
  Convolution,
  DenseLayer,
  DropoutModel,
  Site,
  Taps,
  check_image_shape,
  check_rate,
  drop,
)
from jaxdia.models.flax_interception import ignore_sites, interceptor

# How modules name the argument of __call__ that turns dropout on.
_TRAINING_FLAGS = {"train": True, "training": True, "is_training": True, "deterministic": False}


class _Discovery(NamedTuple):
  """What one call of a module showed.

  Attributes:
    sites: {name: (rate, mask shape)}, in the order of the call.
    dense: {path: [(input shape, output shape) of each call]}, without those that cannot be tapped.
    convolutions: that can be tapped.
    inactive: names of dropout of a rate above 0 that is switched off.
    classifier: path of the dense layer whose outputs are the logits, if one's are.
    logits: their shape and type.
  """

  sites: dict[str, tuple[float, tuple[int, ...]]]
  dense: dict[tuple[str, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]
  convolutions: tuple[Convolution, ...]
  inactive: list[str]
  classifier: tuple[str, ...] | None
  logits: Any


def from_flax(
  module: nn.Module,
  image_shape: tuple[int, int, int],
  *,
  call_kwargs: Mapping[str, Any] | None = None,
) -> DropoutModel:
  """Turns a Flax Linen classifier into a `DropoutModel`.

  Sites are named by the path of the module, such as "block_0/Dropout_0"; a
  module that is called more than once gets "#2", "#3", ... for the later calls.
  Dropout of rate 0, and dropout that the module itself makes deterministic, is
  no site.

  Args:
    module: unbound; called as `module(images, **call_kwargs)`, it returns logits
      f[B, num_classes].
    image_shape: (height, width, channels) of the images.
    call_kwargs: arguments of the call in training. By default the argument
      `train`, `training`, `is_training` or `deterministic` is set if
      `__call__` has one.

  Returns:
    The model; its params are the module's "params" collection.

  Raises:
    InputError: the module draws random numbers elsewhere than in dropout sites
      that can be made explicit (stochastic depth, noise, dropout under
      `nn.scan` or `nn.vmap`, a custom attention function), keeps state (batch
      statistics), has all its dropout switched off or a rate outside [0, 1), or
      does not return a logit vector an image. The message names the module.
  """
  if not isinstance(module, nn.Module):
    raise InputError(
      f"from_flax got {type(module).__name__}; expected an instance of flax.linen.Module. A"
      " network of another library can be given as a jaxdia.models.DropoutModel directly."
    )
  image_shape = check_image_shape(image_shape)
  kwargs = _training_kwargs(module) if call_kwargs is None else dict(call_kwargs)
  name = type(module).__name__

  try:
    inspect.signature(type(module).__call__).bind(module, None, **kwargs)
  except TypeError as error:
    raise InputError(
      f"{name} cannot be called as module(images, **{kwargs}): {error}. Pass call_kwargs to"
      " from_flax with the other arguments of its __call__."
    ) from error

  def call(params, images, *callbacks):
    with nn.intercept_methods(interceptor(*callbacks)):
      return module.apply({"params": params}, images, **kwargs)

  def init(key: Key) -> Params:
    with nn.intercept_methods(interceptor(ignore_sites)):
      variables = module.init(key, jnp.zeros((1, *image_shape)), **kwargs)
    extra = sorted(set(variables) - {"params"})
    if extra:
      raise InputError(
        f"{name} keeps state in the collections {extra} besides 'params' (BatchNorm does);"
        " its gradient is not a function of params, masks and images alone. Use a"
        " normalisation without state, such as nn.GroupNorm or nn.LayerNorm."
      )
    if "params" not in variables:
      raise InputError(f"{name} has no parameters, so a client has no gradient to send.")
    return variables["params"]

  # Of one type, as the params of a run are: a mixture would be converted before its products.
  params_shape = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32),
    _refusing(name, lambda: jax.eval_shape(init, jax.random.key(0))),
  )

  @functools.lru_cache
  def discover(batch_size: int) -> _Discovery:
    return _discover(call, params_shape, (batch_size, *image_shape))

  sites, _, _, inactive, classifier, logits = _refusing(name, lambda: discover(2))
  if getattr(logits, "ndim", None) != 2 or logits.shape[0] != 2:
    raise InputError(
      f"{name} returns {jax.tree.map(lambda x: x.shape, logits)} for 2 images; expected one"
      " array of logits, (2, num_classes)."
    )
  if inactive and not sites:
    raise InputError(
      f"all dropout of {name} ({', '.join(inactive)}) is switched off. Pass call_kwargs to"
      " from_flax with the argument that turns training on, or give it rate 0."
    )
  _check_no_other_randomness(module, name, params_shape, image_shape, kwargs, sites)

  def mask_shapes(batch_size: int) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (_, shape) in discover(batch_size).sites.items()}

  def dense(batch_size: int) -> tuple[DenseLayer, ...]:
    return tuple(
      DenseLayer(path, tuple(math.prod(a[:-1]) for a, _ in calls), calls[0][0][-1], calls[0][1][-1])
      for path, calls in discover(batch_size).dense.items()
    )

  def drop_with(rates, masks, images):
    if set(masks) != set(sites):
      raise InputError(
        f"masks have the sites {sorted(masks)}; {name} has {sorted(sites)}. Take them from"
        " sample_masks or expected_masks."
      )

    def drop_at(name, rate, shape, inputs):
      del rate  # that of the module, in whose place `rates` may have another
      if masks[name].shape != shape:
        raise InputError(
          f"the mask of site {name!r} has shape {masks[name].shape}; expected {shape} for"
          f" {images.shape[0]} images."
        )
      return drop(inputs, masks[name].astype(inputs.dtype), rates[name])

    return drop_at

  def apply(rates, params: Params, masks: Masks, images: Images) -> Logits:
    return call(params, images, drop_with(rates, masks, images))

  def apply_tapped(
    rates, params: Params, masks: Masks, images: Images, taps: Taps
  ) -> tuple[Logits, Taps]:
    tapped_inputs = {path: [] for path in taps}

    def tap(layer, inputs, outputs, nested):
      del nested  # such a layer is not among those that can be tapped
      path = layer.path
      if path not in taps:
        return outputs
      number = len(tapped_inputs[path])
      rows = len(taps[path][number])
      tapped_inputs[path].append(inputs.reshape(rows, -1))
      return outputs + taps[path][number].reshape(outputs.shape)

    logits = call(params, images, drop_with(rates, masks, images), tap)
    return logits, {path: tuple(inputs) for path, inputs in tapped_inputs.items()}

  def at_rates(rates: Mapping[str, float | jax.Array]) -> DropoutModel:
    if set(rates) != set(sites):
      raise InputError(
        f"rates are given for the sites {sorted(rates)}; {name} has {sorted(sites)}. Dropout of"
        " rate 0 is no site: create the network anew to add or remove some."
      )
    for site, rate in rates.items():
      if not isinstance(rate, jax.Array):
        check_rate(rate, f"the rate of the site {site!r}")
    return DropoutModel(
      init=init,
      apply=functools.partial(apply, rates),
      mask_shapes=mask_shapes,
      sites=tuple(Site(site, rates[site]) for site in sites),
      image_shape=image_shape,
      num_classes=logits.shape[1],
      classifier=classifier,
      dense=dense,
      convolutions=discover(1).convolutions,
      apply_tapped=functools.partial(apply_tapped, rates),
      at_rates=at_rates,
    )

  return at_rates({name: rate for name, (rate, _) in sites.items()})


def _discover(call, params_shape, images_shape) -> _Discovery:
  """Traces a call of the module, and sees what is in it."""
  sites: dict[str, tuple[float, tuple[int, ...]]] = {}
  dense: dict[tuple[str, ...], list] = {}
  convolutions: dict[tuple[str, ...], list] = {}
  hidden = set()
  inactive: list[str] = []
  last: dict[str, Any] = {}  # the dense layer that was called last
  classifier = None

  def on_site(name, rate, shape, inputs):
    sites[name] = (rate, shape)
    return inputs

  def on_linear(layer, inputs, outputs, nested):
    path = layer.path
    if isinstance(layer, nn.Dense):
      dense.setdefault(path, []).append((inputs.shape, outputs.shape))
      last.update(path=path, outputs=outputs)
    else:
      alone = layer.clone(parent=None, name=None)
      shapes = inputs.shape[-3:], outputs.shape[-3:]
      convolutions.setdefault(path, []).append(
        Convolution(path, *shapes, lambda leaves, x: alone.apply({"params": leaves}, x))
      )
    if nested:  # what happens inside a transformation cannot be handed out of it
      hidden.add(path)
    return outputs

  def traced(params, images):
    nonlocal classifier
    logits = call(params, images, on_site, on_linear, inactive.append)
    if logits is last.get("outputs"):
      classifier = last["path"]
    last.clear()  # what was traced must not outlive the trace
    return logits

  program, logits = jax.make_jaxpr(traced, return_shape=True)(
    params_shape, jax.ShapeDtypeStruct(images_shape, jnp.float32)
  )
  # A kernel that is changed before its product, or used elsewhere too (tied weights), has a
  # gradient that taps do not tell.
  leaves = jax.tree_util.tree_leaves_with_path(params_shape)
  variables = dict(zip((_names(path) for path, _ in leaves), program.jaxpr.invars, strict=False))
  hidden |= {
    path
    for path, calls in (dense | convolutions).items()
    if _count_products(program.jaxpr, variables.get((*path, "kernel"))) != len(calls)
  }
  tappable = {path: calls for path, calls in dense.items() if path not in hidden}
  once = [calls[0] for p, calls in convolutions.items() if p not in hidden and len(calls) == 1]
  return _Discovery(sites, tappable, tuple(once), inactive, classifier, logits)


def _names(path) -> tuple[str, ...]:
  return tuple(str(getattr(key, "key", key)) for key in path)


def _inner_programs(equation) -> list[jex_core.Jaxpr]:
  kinds = (jex_core.ClosedJaxpr, jex_core.Jaxpr)
  values = jax.tree.leaves(
    list(equation.params.values()), is_leaf=lambda value: isinstance(value, kinds)
  )
  inner = [value for value in values if isinstance(value, kinds)]
  return [p.jaxpr if isinstance(p, jex_core.ClosedJaxpr) else p for p in inner]


def _count_products(program: jex_core.Jaxpr, variable) -> float:
  """Returns how many products of a program use a variable; NaN if anything else does.

  What merely hands a variable on to an inner program is followed into it.
  """
  count = math.nan if any(output is variable for output in program.outvars) else 0
  for equation in program.eqns:
    places = [i for i, value in enumerate(equation.invars) if value is variable]
    inner = _inner_programs(equation)
    if not places:
      continue
    if equation.primitive.name in ("dot_general", "conv_general_dilated"):
      count += len(places)
    elif len(inner) == 1 and len(inner[0].invars) == len(equation.invars):
      count += sum(_count_products(inner[0], inner[0].invars[i]) for i in places)
    else:
      count = math.nan
  return count


def _training_kwargs(module: nn.Module) -> dict[str, bool]:
  parameters = inspect.signature(type(module).__call__).parameters
  return {name: value for name, value in _TRAINING_FLAGS.items() if name in parameters}


def _refusing(name, function):
  """Calls `function`, with Flax's complaints about keys turned into a refusal."""
  try:
    return function()
  except flax_errors.InvalidRngError as error:
    what = str(error).split(" (http")[0]
    raise InputError(
      f"{name} draws random numbers that are no dropout site, which cannot be made an"
      f" explicit mask: {what}. Use nn.Dropout, or turn that part off."
    ) from error


def _check_no_other_randomness(module, name, params_shape, image_shape, kwargs, sites):
  """Refuses a module that draws other random numbers than the masks of its sites.

  It counts the random numbers in the program of the plain module, loops
  included: dropout inside `nn.scan` draws anew in each turn, which one mask
  cannot stand for, and a network may call `make_rng("dropout")` by itself.
  """
  images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
  program = _refusing(
    name,
    lambda: jax.make_jaxpr(
      lambda params, images, key: module.apply(
        {"params": params}, images, rngs={"params": key, "dropout": key}, **kwargs
      )
    )(params_shape, images, jax.random.key(0)),
  )
  drawn = _count_random_numbers(program.jaxpr)
  explicit = sum(math.prod(shape) for _, shape in sites.values())
  if drawn != explicit:
    raise InputError(
      f"{name} draws {drawn} random numbers for 2 images, but its dropout sites"
      f" ({', '.join(sites) or 'none'}) account for {explicit}. What else draws (dropout under"
      " nn.scan or nn.vmap, stochastic depth, noise) cannot be made an explicit mask: unroll"
      " the loop, or turn that part off."
    )


def _count_random_numbers(program: jex_core.Jaxpr) -> float:
  count = 0
  for equation in program.eqns:
    if equation.primitive.name == "random_bits":
      # Under nn.vmap there is a batch of keys, which the parameter "shape" leaves out.
      count += math.prod(equation.outvars[0].aval.shape)
      continue
    turns = {"scan": equation.params.get("length"), "while": math.inf}
    for inner in _inner_programs(equation):
      if (drawn := _count_random_numbers(inner)) > 0:
        count += drawn * turns.get(equation.primitive.name, 1)
  return count
