"""Makes the dropout of an ordinary Flax Linen module explicit.

Flax lets a caller intercept the method calls of a module and of all that it
contains. The adapter intercepts `nn.Dropout`, and the attention weights of
`nn.MultiHeadDotProductAttention`, and puts a mask that it was handed where Flax
would draw one. So a user's module needs no rewriting.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors as flax_errors
from flax import linen as nn
from jax.extend import core as jex_core

from jaxdia.errors import InputError
from jaxdia.models.base import DropoutModel, Site, check_image_shape, check_rate, drop
from jaxdia.typing import Images, Key, Logits, Masks, Params

# How modules name the argument of __call__ that turns dropout on.
_TRAINING_FLAGS = {"train": True, "training": True, "is_training": True, "deterministic": False}

# on_site(name, rate, mask shape, activations) -> activations after dropout
_OnSite = Callable[[str, float, tuple[int, ...], jax.Array], jax.Array]


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
      `nn.scan`, a custom attention function), keeps state (batch statistics),
      has a rate outside [0, 1), or does not return a logit vector an image. The
      message names the module.
  """
  if not isinstance(module, nn.Module):
    raise InputError(
      f"from_flax got {type(module).__name__}; expected an instance of flax.linen.Module. A"
      " network of another library can be given as a jaxdia.models.DropoutModel directly."
    )
  image_shape = check_image_shape(image_shape)
  kwargs = _training_kwargs(module) if call_kwargs is None else dict(call_kwargs)
  name = type(module).__name__

  def call(variables, images, on_site, on_dense=None, **options):
    interceptor = _interceptor(on_site, on_dense)
    with nn.intercept_methods(interceptor):
      return module.apply(variables, images, **kwargs, **options)

  def init(key: Key) -> Params:
    with nn.intercept_methods(_interceptor(lambda name, rate, shape, inputs: inputs)):
      variables = module.init(key, jnp.zeros((1, *image_shape)), **kwargs)
    extra = sorted(set(variables) - {"params"})
    if extra:
      raise InputError(
        f"{name} keeps state in the collections {extra} besides 'params' (BatchNorm does);"
        " its gradient is not a function of params, masks and images alone. Use a"
        " normalisation without state, such as nn.GroupNorm or nn.LayerNorm."
      )
    return variables["params"]

  params_shape = _refusing(name, lambda: jax.eval_shape(init, jax.random.key(0)))

  @functools.lru_cache
  def discover(batch_size: int):
    sites: dict[str, tuple[float, tuple[int, ...]]] = {}
    dense: list[tuple[tuple[str, ...], tuple[int, ...]]] = []

    def record_site(name, rate, shape, inputs):
      sites[name] = (rate, shape)
      return inputs

    def record_dense(path, outputs):
      dense.append((path, outputs.shape))

    images = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32)
    logits = jax.eval_shape(
      lambda params, images: call({"params": params}, images, record_site, record_dense),
      params_shape,
      images,
    )
    return sites, dense, logits

  sites, dense, logits = _refusing(name, lambda: discover(2))
  if getattr(logits, "ndim", None) != 2 or logits.shape[0] != 2:
    raise InputError(
      f"{name} returns {jax.tree.map(lambda x: x.shape, logits)} for 2 images; expected one"
      " array of logits, (2, num_classes)."
    )
  _check_no_other_randomness(module, name, params_shape, image_shape, kwargs, sites)
  classifiers = [path for path, shape in dense if shape == logits.shape]

  def mask_shapes(batch_size: int) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (_, shape) in discover(batch_size)[0].items()}

  def apply(params: Params, masks: Masks, images: Images) -> Logits:
    if set(masks) != set(sites):
      raise InputError(
        f"masks have the sites {sorted(masks)}; {name} has {sorted(sites)}. Take them from"
        " sample_masks or expected_masks."
      )

    def drop_at(name, rate, shape, inputs):
      if masks[name].shape != shape:
        raise InputError(
          f"the mask of site {name!r} has shape {masks[name].shape}; expected {shape} for"
          f" {images.shape[0]} images."
        )
      return drop(inputs, masks[name].astype(inputs.dtype), rate)

    return call({"params": params}, images, drop_at)

  return DropoutModel(
    init=init,
    apply=apply,
    mask_shapes=mask_shapes,
    sites=tuple(Site(name, rate) for name, (rate, _) in sites.items()),
    image_shape=image_shape,
    num_classes=logits.shape[1],
    classifier=classifiers[-1] if classifiers else None,
  )


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


def _interceptor(on_site: _OnSite, on_dense=None):
  """Returns a Flax method interceptor that reports dropout sites and dense layers."""
  calls: dict[str, int] = {}

  def site_name(module):
    path = "/".join(module.path) or type(module).__name__
    calls[path] = calls.get(path, 0) + 1
    return path if calls[path] == 1 else f"{path}#{calls[path]}"

  def intercept(next_fun, args, kwargs, context):
    module = context.module
    if context.method_name != "__call__":
      return next_fun(*args, **kwargs)
    if isinstance(module, nn.Dropout):
      return _dropout(on_site, site_name, next_fun, args, kwargs, module)
    if isinstance(module, nn.MultiHeadDotProductAttention) and module.dropout_rate != 0:
      return _attention(on_site, site_name, next_fun, args, kwargs, module)
    outputs = next_fun(*args, **kwargs)
    if on_dense is not None and isinstance(module, nn.Dense):
      on_dense(module.path, outputs)
    return outputs

  return intercept


def _dropout(on_site, site_name, next_fun, args, kwargs, module):
  where = "/".join(module.path) or type(module).__name__
  if type(module).__call__ is not nn.Dropout.__call__:
    raise InputError(
      f"the dropout {where!r} is a {type(module).__name__} with a __call__ of its own, so its"
      " masks cannot be made explicit. Use nn.Dropout."
    )
  bound = inspect.signature(nn.Dropout.__call__).bind(module, *args, **kwargs).arguments
  deterministic = bound.get("deterministic")
  if module.deterministic is None and deterministic is None:
    raise InputError(
      f"the dropout {where!r} is not told whether it is on. Give it deterministic=False, or"
      " pass call_kwargs to from_flax with the argument that turns training on."
    )
  if nn.merge_param("deterministic", module.deterministic, deterministic) or module.rate == 0:
    return next_fun(*args, **kwargs)
  inputs = bound["inputs"]
  shape = list(inputs.shape)
  for axis in module.broadcast_dims:
    shape[axis] = 1
  rate = check_rate(module.rate, f"the rate of the dropout {where!r}")
  return on_site(site_name(module), rate, tuple(shape), inputs)


def _attention(on_site, site_name, next_fun, args, kwargs, module):
  where = "/".join(module.path) or type(module).__name__
  if module.attention_fn is not nn.dot_product_attention:
    raise InputError(
      f"the attention {where!r} has a custom attention_fn, so the masks of its dropout cannot"
      " be made explicit. Use nn.dot_product_attention, or dropout_rate=0 there."
    )
  rate = check_rate(module.dropout_rate, f"the dropout_rate of the attention {where!r}")

  @functools.wraps(nn.dot_product_attention)
  def attention_with_mask(*args, deterministic, broadcast_dropout, precision, **kwargs):
    if deterministic:
      return nn.dot_product_attention(*args, deterministic=True, precision=precision, **kwargs)
    einsum = functools.partial(jnp.einsum, precision=precision)

    def weigh_values(equation, weights, values):
      shape = weights.shape
      if broadcast_dropout:  # one mask for all samples and heads
        shape = (1,) * (weights.ndim - 2) + shape[-2:]
      return einsum(equation, on_site(site_name(module), rate, shape, weights), values)

    kwargs |= {"qk_attn_weights_einsum": einsum, "attn_weights_value_einsum": weigh_values}
    return nn.dot_product_attention(*args, deterministic=True, **kwargs)

  # The module reads its attention function from a field of a frozen dataclass. It also asks
  # for a key unless it has one, though none is used.
  kwargs = {**kwargs, "dropout_rng": jax.random.key(0)}
  object.__setattr__(module, "attention_fn", attention_with_mask)
  try:
    return next_fun(*args, **kwargs)
  finally:
    object.__setattr__(module, "attention_fn", nn.dot_product_attention)


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


def _count_random_numbers(jaxpr) -> float:
  count = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "random_bits":
      count += math.prod(equation.params["shape"])
      continue
    inner = [
      sub.jaxpr if isinstance(sub, jex_core.ClosedJaxpr) else sub
      for sub in jax.tree.leaves(
        list(equation.params.values()),
        is_leaf=lambda x: isinstance(x, (jex_core.ClosedJaxpr, jex_core.Jaxpr)),
      )
      if isinstance(sub, (jex_core.ClosedJaxpr, jex_core.Jaxpr))
    ]
    turns = {"scan": equation.params.get("length"), "while": math.inf}
    for sub in inner:
      if (drawn := _count_random_numbers(sub)) > 0:
        count += drawn * turns.get(equation.primitive.name, 1)
  return count
