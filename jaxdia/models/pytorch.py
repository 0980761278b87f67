"""Makes the dropout of an ordinary PyTorch module explicit, and computes it in JAX by torchax.

All dropout of PyTorch, that of attention included, draws by `Tensor.bernoulli_` and divides by the
probability to keep. There a mask is put in; so a user's module needs no rewriting.
"""

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jaxdia.core.errors import InputError
from jaxdia.core.trees import digest, replaced
from jaxdia.core.types import Array, Images, NamedArrays, Params
from jaxdia.models import discovery
from jaxdia.models.base import DropoutModel, Network, check_image_shape, model_of
from jaxdia.models.convolutions import PlainConvolution
from jaxdia.models.entries import InstanceNetwork, arrays_of, to_numpy
from jaxdia.models.hooks import Hooks, Linear, SiteCall, SiteNames
from jaxdia.models.layers import Entry

# pyright: reportMissingImports=false
try:
  import torch
  from torch import _ops, nn
  from torch.nn.modules.batchnorm import _BatchNorm
  from torch.utils._python_dispatch import TorchDispatchMode
except ImportError as error:
  raise InputError(
    'PyTorch modules need the packages torch and torchax. Run pip install "jaxdia[torch]".'
  ) from error

# Hooks are put into a network's module for the time of a call.
_LOCK = threading.RLock()


class _Call(NamedTuple):
  """What a network is called with.

  Attributes:
    hooks: of the call.
    names: of its sites.
    modules: the names of the modules that are being called, from the outermost on.
    drawn: the masks that PyTorch drew, where they are asked for.
    buffers: of the network, {name: array}; BatchNorm puts its new averages there.
  """

  hooks: Hooks
  names: SiteNames
  modules: list[str]
  drawn: Iterator[jax.Array] | None
  buffers: dict[str, jax.Array]


_calls: list[_Call] = []


class _Absent:
  """Stands for an operator that PyTorch does not have, and that is never called."""

  def __getattr__(self, name: str) -> "_Absent":
    if name.startswith("_"):
      raise AttributeError(name)
    return _Absent()


@contextlib.contextmanager
def _absent_operators() -> Iterator[None]:
  """Lets torchax name operators that PyTorch does not have.

  torchax 0.0.13 lists those of named dimensions, which PyTorch 2.13 has no longer, and
  aten.cholesky, which 2.14 has not.
  """
  kinds = (_ops._OpNamespace, _ops.OpOverloadPacket)
  found = [kind.__getattr__ for kind in kinds]

  def finder(find):
    def find_or_stand_in(owner, name):
      try:
        return find(owner, name)
      except AttributeError:
        if name.startswith("_"):
          raise
        return _Absent()

    return find_or_stand_in

  for kind, find in zip(kinds, found, strict=True):
    setattr(kind, "__getattr__", finder(find))  # noqa: B010
  try:
    yield
  finally:
    for kind, find in zip(kinds, found, strict=True):
      setattr(kind, "__getattr__", find)  # noqa: B010


@functools.lru_cache
def _environment() -> Any:
  """Returns what computes PyTorch's operators in JAX, with dropout intercepted."""
  try:
    with _absent_operators():
      from torchax.ops.op_base import InplaceOp
      from torchax.tensor import Environment

      environment = Environment()
  except ImportError as error:
    raise InputError(
      'PyTorch modules need the package torchax. Run pip install "jaxdia[torch]".'
    ) from error
  environment.override_op_definition(
    torch.ops.aten.bernoulli_.float, InplaceOp(_bernoulli, is_jax_func=True)
  )
  return environment


def _bernoulli(noise: jax.Array, p: float = 0.5, generator: Any = None) -> jax.Array:
  """Stands for `Tensor.bernoulli_`, which is divided by `p` afterwards."""
  del generator
  call = _calls[-1]
  drawn = None if call.drawn is None else next(call.drawn, None)
  if call.drawn is not None and (drawn is None or drawn.shape != noise.shape):
    raise InputError("PyTorch itself drew other masks than it does by torchax.")
  site = SiteCall(
    call.names(call.modules[-1].replace(".", "/") or "dropout"),
    round(1 - p, 12),  # 1 - 0.7 is not quite 0.3
    noise.shape,
    jnp.ones_like(noise),
    None if drawn is None else lambda: drawn,
  )
  return call.hooks.on_site(site) * p


class _Cumulative(float):
  """The momentum of BatchNorm that averages all batches, 1 / their number.

  PyTorch makes a number of None, for which it reads the traced count of batches.
  """


class TorchNetwork(InstanceNetwork):
  """A PyTorch module as a network; see `from_torch`."""

  def __init__(self, module: nn.Module, image_shape: tuple[int, int, int]):  # noqa: D107
    arrays = {name: to_numpy(x).copy() for name, x in module.named_parameters()}
    self._buffers = {name: to_numpy(x).copy() for name, x in module.named_buffers()}
    structure = _structure(module)
    # Without arrays of its own, so that none can be taken for those that it is called with.
    self._module = copy.deepcopy(module).to("meta")
    for layer in self._module.modules():
      if isinstance(layer, _BatchNorm) and layer.momentum is None:
        layer.momentum = _Cumulative()
    identity = (structure, digest(self._buffers))
    name = type(module).__name__
    super().__init__(name, image_shape, arrays, _entries(module, arrays), identity)

  def constants(self) -> tuple[str, ...]:
    """Returns the names of the module's buffers, such as running averages."""
    return tuple(self._buffers)

  def with_constants(self, arrays: NamedArrays) -> Network:
    """Returns the network with other buffers, such as running averages."""
    buffers = replaced(self._buffers, arrays)
    return self.in_mode(("constants", digest(buffers)), _buffers=buffers)

  def evaluation(self) -> Network:
    """Returns the network in evaluation mode, in which BatchNorm takes its averages."""
    return self.in_mode("evaluation", _module=copy.deepcopy(self._module).eval())

  def call(self, params: Params, images: Images, hooks: Hooks, rngs: Any = None) -> Any:
    """Computes logits, with dropout and linear layers intercepted."""
    buffers = {name: jnp.asarray(x) for name, x in self._buffers.items()}
    return self._step(params, images, hooks, rngs, buffers)

  def constants_after(
    self, params: Params, images: Images, hooks: Hooks, before: Mapping[str, Shaped[Array, "..."]]
  ) -> dict[str, Shaped[Array, "..."]]:
    """Returns what a step makes of the buffers, such as running averages, by name."""
    after = {name: jnp.asarray(before.get(name, x)) for name, x in self._buffers.items()}
    self._step(params, images, hooks, None, after)
    return after

  def _step(self, params, images, hooks, rngs, buffers):
    """Returns logits; running averages among the buffers are as after the step then."""
    environment = _environment()
    arrays = arrays_of(self.entries(), params)
    images = images.transpose(0, 3, 1, 2)
    drawn = None if rngs is None else iter(self._draw(arrays, images, rngs))
    call = _Call(hooks, SiteNames(), [""], drawn, buffers)
    states, inputs = environment.j2t_iso((arrays | buffers, images))
    with _LOCK, self._hooked(call, environment):
      _calls.append(call)
      try:
        with environment:
          logits = torch.func.functional_call(self._module, states, (inputs,))
      finally:
        _calls.pop()
    return environment.t2j_iso(logits)

  @contextlib.contextmanager
  def _hooked(self, call: _Call, environment: Any) -> Iterator[None]:
    """Lets the modules tell where a call is, and linear layers what they compute."""

    def enter(name):
      return lambda *_: call.modules.append(name)

    def leave(*_):
      call.modules.pop()

    def tell(layer, on_linear):
      def hook(module, inputs, outputs):
        del module
        given, found = environment.t2j_iso((inputs[0], outputs))
        if layer.convolution is not None and found.ndim != 4:
          return None
        changed = on_linear(layer, given, found, False)
        return None if changed is found else environment.j2t_iso(changed)

      return hook

    def follow(name):
      def hook(module, inputs, outputs):
        del outputs
        _follow_averages(name, module, environment.t2j_iso(inputs[0]), call.buffers)

      return hook

    handles, on_linear = [], call.hooks.on_linear
    for name, module in self._module.named_modules():
      handles.append(module.register_forward_pre_hook(enter(name), prepend=True))
      convolution = _alone(module)
      if on_linear is not None and (convolution or _is_plain(module, nn.Linear)):
        layer = Linear(tuple(name.split(".")) if name else (), convolution)
        handles.append(module.register_forward_hook(tell(layer, on_linear)))
      if isinstance(module, _BatchNorm):
        handles.append(module.register_forward_hook(follow(name)))
      handles.append(module.register_forward_hook(leave))
    try:
      yield
    finally:
      for handle in handles:
        handle.remove()

  def _draw(self, arrays, images, seed) -> list[jax.Array]:
    """Returns the masks that PyTorch itself draws on a CPU after `torch.manual_seed`."""
    drawn: list[jax.Array] = []

    class Recorder(TorchDispatchMode):
      def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.bernoulli_.float:
          drawn.append(jnp.asarray(result.numpy().copy()))
        return result

    states = {n: torch.from_numpy(np.array(x)) for n, x in (arrays | self._buffers).items()}
    with torch.random.fork_rng(devices=[]), torch.no_grad(), Recorder():
      torch.manual_seed(seed)
      torch.func.functional_call(self._module, states, (torch.from_numpy(np.array(images)),))
    return drawn


def _follow_averages(
  name: str, layer: Any, inputs: jax.Array, buffers: dict[str, jax.Array]
) -> None:
  """Puts new averages of BatchNorm in place of the old ones, as torchax does not."""
  names = [f"{name}.{which}" for which in ("running_mean", "running_var", "num_batches_tracked")]
  if not layer.training or names[0] not in buffers:
    return
  before = [buffers[name] for name in names]
  count = before[2] + 1
  share = 1 / count if isinstance(layer.momentum, _Cumulative) else layer.momentum
  axes, values = (0, *range(2, inputs.ndim)), inputs.size // inputs.shape[1]
  moments = jnp.mean(inputs, axes), jnp.var(inputs, axes, ddof=1) if values > 1 else 0
  after = [old + share * (new - old) for old, new in zip(before[:2], moments, strict=True)]
  buffers.update(zip(names, [*after, count], strict=True))


def _entries(module: nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, Entry]:
  """Returns where the arrays lie among the params: kernels as Flax has them."""
  entries = {}
  modules = dict(module.named_modules())
  for name, array in arrays.items():
    *path, last = name.split(".")
    owner, axes = modules[".".join(path)], None
    if last == "weight" and isinstance(owner, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
      last, axes = "kernel", (*range(2, array.ndim), 1, 0)
    entries[name] = Entry((*path, last), axes)
  return entries


def _is_plain(module: nn.Module, kind: type) -> bool:
  """Returns whether a module is of a kind, and computes with its own weight as it is."""
  return type(module) is kind and "weight" in module._parameters


def _alone(module: Any) -> PlainConvolution | None:
  """Returns a convolution of images by itself, or None if it is of another kind."""
  if not _is_plain(module, nn.Conv2d) or module.padding_mode != "zeros":
    return None
  padding = module.padding
  padding = padding.upper() if isinstance(padding, str) else tuple((n, n) for n in padding)
  return PlainConvolution(
    module.stride, padding, kernel_dilation=module.dilation, groups=module.groups, layout="NCHW"
  )


class _Same:
  """A value that does not compare, which equals itself alone."""

  def __init__(self, value: Any):
    self.value = value

  def __hash__(self) -> int:
    return id(self.value)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Same) and self.value is other.value


def _structure(value: Any) -> Hashable:
  """Returns what a module computes with, but for arrays that it knows by a name."""
  if isinstance(value, nn.Module):
    fields = vars(value)
    named = {
      kind: {name: None if x is None else (x.shape, x.dtype) for name, x in fields[kind].items()}
      for kind in ("_parameters", "_buffers")
    }
    return (type(value), _structure(fields | named))
  if isinstance(value, torch.Tensor):
    return digest({"": to_numpy(value)})
  if isinstance(value, dict):
    return tuple((key, _structure(x)) for key, x in value.items())
  if isinstance(value, (list, tuple)):
    return (type(value), *(_structure(x) for x in value))
  if isinstance(value, set):
    return frozenset(value)
  try:
    hash(value)
  except TypeError:
    return _Same(value)
  return value


def from_torch(module: nn.Module, image_shape: tuple[int, int, int]) -> DropoutModel:
  """Turns a PyTorch classifier into a `DropoutModel`.

  The module is taken as it is, in the mode that it is in (`module.train()`), and stays untouched.
  Sites are named by the path of the module, such as "layers/0/dropout1".

  Args:
    module: called as `module(images)` with images f[B, C, H, W], it returns logits
      f[B, num_classes].
    image_shape: (height, width, channels) of the images; they are turned for the module.

  Returns:
    The model. Its `init` returns the module's own weights, whatever the key. Buffers, such as
    running averages, are constant. `model.network.entries()` tells where each array lies.

  Raises:
    InputError: torchax is not installed, the module draws random numbers elsewhere than in
      dropout, all its dropout is switched off, or it does not return two logits or more an image.
  """
  if not isinstance(module, nn.Module):
    raise InputError(
      f"from_torch got {type(module).__name__}; expected an instance of torch.nn.Module."
    )
  kinds: tuple[Callable[..., Any], ...] = (nn.AlphaDropout, nn.FeatureAlphaDropout)
  for name, inner in module.named_modules():
    if isinstance(inner, kinds) and inner.p > 0 and inner.training:
      raise InputError(
        f"the dropout {name!r} is {type(inner).__name__}, which does not multiply by its mask"
        " alone, so that cannot be made explicit. Use nn.Dropout."
      )
  network = TorchNetwork(module, check_image_shape(image_shape))
  with discovery.naming_failures(network):
    model = model_of(network)
  off = [
    name
    for name, inner in module.named_modules()
    if isinstance(inner, nn.modules.dropout._DropoutNd) and inner.p > 0 and not inner.training
  ]
  discovery.check_is_on(network, off, "Call module.train() before")
  discovery.check_no_randomness(network, "Turn that part off.")
  return model
