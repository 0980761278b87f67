"""Interception of the calls inside a Flax Linen module: dropout, attention, linear layers."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.core import tracers
from flax.linen.dtypes import promote_dtype

from jaxdia.core.errors import InputError
from jaxdia.models.base import check_rate
from jaxdia.models.convolutions import PlainConvolution
from jaxdia.models.hooks import Hooks, Linear, SiteCall, SiteNames, check_plain_dropout


def interceptor(hooks: Hooks) -> Callable[..., Any]:
  """Returns a Flax method interceptor for one call of a module.

  Args:
    hooks: called at dropout, and after each `nn.Dense` or `nn.DenseGeneral`, and each
      `nn.Conv` on images.

  Raises:
    InputError: from inside the call, for dropout that cannot be made explicit.
  """
  on_site, on_linear, on_inactive = hooks
  names = SiteNames()
  outer = tracers.current_trace()
  patched = set()  # attention layers that are being called with masks

  def site_name(module):
    return names("/".join(module.path) or type(module).__name__)

  def intercept(next_fun, args, kwargs, context):
    module = context.module
    if context.method_name != "__call__":
      return next_fun(*args, **kwargs)
    if isinstance(module, nnx.bridge.ToLinen):
      raise InputError(
        f"{'/'.join(module.path) or type(module).__name__} is a module of Flax NNX in a bridge,"
        " into which nothing is seen. Give the network as a module of NNX to from_nnx, or write the"
        " layer in Linen."
      )
    if isinstance(module, nn.Dropout):
      return _dropout(on_site, on_inactive, site_name, next_fun, args, kwargs, module)
    if isinstance(module, nn.MultiHeadDotProductAttention) and module.dropout_rate != 0:
      if id(module) in patched:  # a subclass, such as nn.SelfAttention, calls its parent
        return next_fun(*args, **kwargs)
      patched.add(id(module))
      try:
        return _attention(on_site, on_inactive, site_name, next_fun, args, kwargs, module)
      finally:
        patched.remove(id(module))
    with _widened(module, args, kwargs):
      outputs = next_fun(*args, **kwargs)
    contracted = _contracted_axes(module)
    convolution = plain_convolution(module) if type(module) is nn.Conv else None
    if convolution is not None and (outputs.ndim != 4 or module.conv_general_dilated_cls):
      convolution = None
    if on_linear is None or not (convolution or contracted):
      return outputs
    nested = tracers.current_trace() != outer
    inputs = jnp.asarray(args[0] if args else kwargs["inputs"], outputs.dtype)
    if convolution is not None:
      return on_linear(Linear(module.path, convolution), inputs, outputs, nested)
    if contracted > inputs.ndim:
      return outputs
    rows = inputs.shape[: inputs.ndim - contracted]
    flat = on_linear(
      Linear(module.path, None),
      inputs.reshape(*rows, -1),
      outputs.reshape(*rows, -1),
      nested,
    )
    return flat.reshape(outputs.shape)

  return intercept


@contextlib.contextmanager
def _widened(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
  """Lets a layer of Flax that has a type of its own compute in float64 where it is given that."""
  given = jax.tree.leaves((args, kwargs))
  dtype = getattr(module, "dtype", None)
  if (
    dtype is None
    or not type(module).__module__.startswith("flax.")
    or not any(getattr(x, "dtype", None) == jnp.float64 for x in given)
  ):
    yield
    return
  # Modules are frozen dataclasses.
  object.__setattr__(module, "dtype", None)
  try:
    yield
  finally:
    object.__setattr__(module, "dtype", dtype)


def _contracted_axes(module: nn.Module) -> int:
  """Returns over how many axes, the last ones, a dense layer sums; 0 for what is no plain one.

  It is plain if it computes `a @ kernel + bias`, in whatever type; its kernel may have an axis for
  each that it sums over or makes.
  """
  if type(module) not in (nn.Dense, nn.DenseGeneral):
    return 0
  if module.dot_general is not None or module.dot_general_cls is not None:
    return 0
  if module.promote_dtype is not promote_dtype:
    return 0
  if type(module) is nn.Dense:
    return 1
  axes = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
  is_last = axes == tuple(range(-len(axes), 0))
  return len(axes) if is_last and not module.batch_dims else 0


def plain_convolution(layer: Any) -> PlainConvolution | None:
  """Returns a convolution by itself, or None if it is no plain one of images.

  Args:
    layer: `nn.Conv` or `nnx.Conv`.
  """

  def pair(value):
    value = 1 if value is None else value
    return (value, value) if isinstance(value, int) else tuple(value)

  padding = layer.padding
  if isinstance(padding, str):
    padding = padding.upper()
  else:
    padding = tuple((n, n) if isinstance(n, int) else tuple(n) for n in pair(padding))
  plain = (
    not isinstance(layer.kernel_size, int)  # of one axis
    and len(layer.kernel_size) == 2
    and layer.mask is None
    and layer.conv_general_dilated in (None, jax.lax.conv_general_dilated)
    and padding != "CAUSAL"
  )
  if not plain:
    return None
  dilations = pair(layer.input_dilation), pair(layer.kernel_dilation)
  return PlainConvolution(pair(layer.strides), padding, *dilations, layer.feature_group_count)


def _dropout(on_site, on_inactive, site_name, next_fun, args, kwargs, module):
  where = "/".join(module.path) or type(module).__name__
  check_plain_dropout(where, module, nn.Dropout, "nn.Dropout")
  bound = inspect.signature(nn.Dropout.__call__).bind(module, *args, **kwargs).arguments
  deterministic = bound.get("deterministic")
  if module.deterministic is None and deterministic is None:
    raise InputError(
      f"the dropout {where!r} is not told whether it is on. Give it deterministic=False, or"
      " pass call_kwargs to from_flax with the argument that turns training on."
    )
  if module.rate == 0:
    return next_fun(*args, **kwargs)
  if nn.merge_param("deterministic", module.deterministic, deterministic):
    on_inactive(where)
    return next_fun(*args, **kwargs)
  inputs = bound["inputs"]
  shape = list(inputs.shape)
  for axis in module.broadcast_dims:
    shape[axis] = 1
  rate = check_rate(module.rate, f"the rate of the dropout {where!r}")

  def draw():
    ones = jnp.ones_like(inputs)
    drawn = next_fun(*((ones, *args[1:]) if args else args), **_replace(kwargs, "inputs", ones))
    return drawn[tuple(slice(n) for n in shape)] != 0

  return on_site(SiteCall(site_name(module), rate, tuple(shape), inputs, draw))


def _replace(kwargs: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
  return kwargs | {name: value} if name in kwargs else kwargs


def _attention(on_site, on_inactive, site_name, next_fun, args, kwargs, module):
  where = "/".join(module.path) or type(module).__name__
  if module.attention_fn is not nn.dot_product_attention:
    raise InputError(
      f"the attention {where!r} has a custom attention_fn, so the masks of its dropout cannot"
      " be made explicit. Use nn.dot_product_attention, or dropout_rate=0 there."
    )
  rate = check_rate(module.dropout_rate, f"the dropout_rate of the attention {where!r}")

  @functools.wraps(nn.dot_product_attention)
  def attention_with_mask(
    *args,
    deterministic,
    broadcast_dropout,
    precision,
    qk_attn_weights_einsum,
    attn_weights_value_einsum,
    dropout_rng=None,
    **kwargs,
  ):
    plain = functools.partial(jnp.einsum, precision=precision)
    weigh_values = attn_weights_value_einsum or plain

    def drop_and_weigh_values(equation, weights, values):
      if deterministic:
        on_inactive(where)
        return weigh_values(equation, weights, values)
      shape = weights.shape
      if broadcast_dropout:  # one mask for all samples and heads
        shape = (1,) * (weights.ndim - 2) + shape[-2:]

      def draw():
        drawn = []
        nn.dot_product_attention(
          jnp.zeros_like(args[0]),  # so that no weight is zero that was not dropped
          *args[1:],
          deterministic=False,
          dropout_rng=dropout_rng,
          broadcast_dropout=broadcast_dropout,
          qk_attn_weights_einsum=plain,
          attn_weights_value_einsum=lambda _, weights, values: drawn.append(weights) or values,
          **{name: kwargs[name] for name in ("dropout_rate", "dtype") if name in kwargs},
        )
        return drawn[0][tuple(slice(n) for n in shape)] != 0

      call = SiteCall(site_name(module), rate, shape, weights, draw)
      return weigh_values(equation, on_site(call), values)

    return nn.dot_product_attention(
      *args,
      deterministic=True,
      qk_attn_weights_einsum=qk_attn_weights_einsum or plain,
      attn_weights_value_einsum=drop_and_weigh_values,
      **kwargs,
    )

  # The module reads its attention function from a field of a frozen dataclass.
  object.__setattr__(module, "attention_fn", attention_with_mask)
  try:
    return next_fun(*args, **kwargs)
  finally:
    object.__setattr__(module, "attention_fn", nn.dot_product_attention)
