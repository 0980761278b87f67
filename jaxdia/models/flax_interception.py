"""Interception of the calls inside a Flax Linen module: dropout, attention, dense layers."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import tracers

from jaxdia.errors import InputError
from jaxdia.models.base import check_rate

# on_site(name, rate, mask shape, activations) -> activations after dropout
OnSite = Callable[[str, float, tuple[int, ...], jax.Array], jax.Array]
# on_dense(path, inputs, outputs, nested) -> outputs; nested: inside a transformation such as remat
OnDense = Callable[[tuple[str, ...], jax.Array, jax.Array, bool], jax.Array]


def ignore_sites(name: str, rate: float, shape: tuple[int, ...], inputs: jax.Array) -> jax.Array:
  """Is an `OnSite` that makes dropout the identity."""
  del name, rate, shape
  return inputs


def interceptor(on_site: OnSite, on_dense: OnDense | None = None) -> Callable[..., Any]:
  """Returns a Flax method interceptor for one call of a module.

  Args:
    on_site: called at each dropout site, in place of its dropout.
    on_dense: called after each `nn.Dense`.

  Raises:
    InputError: from inside the call, for dropout that cannot be made explicit.
  """
  calls: dict[str, int] = {}
  outer = tracers.current_trace()

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
    if on_dense is not None and type(module) is nn.Dense:
      nested = tracers.current_trace() != outer
      inputs = args[0] if args else kwargs["inputs"]
      outputs = on_dense(module.path, inputs, outputs, nested)
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
