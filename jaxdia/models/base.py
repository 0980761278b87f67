"""A dropout model: pure functions with the masks as an argument, and equal by value.

What a program is compiled for, the `Network`, is static; the dropout rates are leaves of the
tree that a `DropoutModel` is. So a function that takes a model as an argument is compiled
once for all rates, and equal models share what was compiled for one of them.
"""

import abc
import math
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float

from jaxdia.core.errors import InputError, check_count, check_number, unknown
from jaxdia.core.precision import full_precision, usual_promotion
from jaxdia.core.trees import Path, is_traced, leaves_by_path, static, value_tree
from jaxdia.core.types import (
  Array,
  Images,
  Key,
  Logits,
  Masks,
  NamedArrays,
  Number,
  Params,
  as_numbers,
  check_key,
)
from jaxdia.models import discovery, layers
from jaxdia.models.convolutions import CONVOLVE, Convolve, is_faster_as_product
from jaxdia.models.hooks import Hooks, ignore_sites
from jaxdia.models.layers import Convolution, DenseLayer, Entry, Shape, Site, Taps, drop

# added(inputs, shape of the outputs) -> what is added to them
Added = Callable[[Float[Array, "..."], Shape], Float[Array, "..."]]


class Network(abc.ABC):
  """A network of some library, all but its dropout rates: what an adapter implements.

  It is hashable, and equal to networks that compute the same by the same program.

  Attributes:
    name: what messages call it.
    image_shape: (height, width, channels).
  """

  name: str
  image_shape: tuple[int, int, int]

  @abc.abstractmethod
  def init(self, key: Key) -> Params:
    """Draws parameters, or returns those that the network was given with."""

  @abc.abstractmethod
  def call(self, params: Params, images: Images, hooks: Hooks, rngs: Any = None) -> Logits:
    """Computes f[B, num_classes] logits, and calls the hooks meanwhile.

    Args:
      params: as `init` gives them.
      images: f[B, H, W, C], normalised.
      hooks: at dropout and linear layers.
      rngs: in the library's own form; `SiteCall.draw` then gives the masks drawn from them.
    """

  def entries(self) -> dict[str, Entry]:
    """Returns where each array lies that the library itself knows by a name, by that name.

    Unless an adapter knows better, it is the path with dots.
    """
    return {".".join(path): Entry(path) for path in leaves_by_path(discovery.params_shape(self))}

  def constants(self) -> tuple[str, ...]:
    """Returns the library's names of arrays that no training changes, such as averages."""
    return ()

  def with_constants(self, arrays: NamedArrays) -> "Network":
    """Returns the network with other arrays in place of its `constants`, where names say so."""
    return self

  def evaluation(self) -> "Network":
    """Returns the network in which BatchNorm takes its averages, if a call's argument says so."""
    return self


@value_tree
class DropoutModel:
  """A classifier whose dropout masks are an explicit argument.

  Attributes:
    network: all but the rates; static.
    rates: {site name: rate}, in the order in which the network meets the sites. A network
      without dropout has none, and its masks are the empty dictionary.
    convolve: how convolutions are computed: "native", as a "product" of patches, or "auto", which
      is by what is faster, on JAX's default backend; static.
  """

  network: Network = static()
  rates: dict[str, Number]
  convolve: Convolve = static(default="auto")

  def __post_init__(self):
    if not isinstance(self.network, Network):
      raise InputError(
        f"the network is of type {type(self.network).__name__}; expected a jaxdia.models.Network."
        " Of a module from_module makes a model, of plain functions from_functions."
      )
    if self.convolve not in CONVOLVE:
      raise unknown("way to convolve:", self.convolve, CONVOLVE)
    sites = discovery.discover(self.network, 2).sites
    if set(self.rates) != set(sites):
      raise InputError(
        f"rates are given for the sites {sorted(self.rates)}; {self.network.name} has"
        f" {sorted(sites)}. Dropout of rate 0 is no site: create the network anew to add or"
        " remove some."
      )
    rates = {
      site: rate if is_traced(rate) else check_rate(rate, f"the rate of site {site!r}")
      for site, rate in self.rates.items()
    }
    object.__setattr__(self, "rates", {site: rates[site] for site in sites})

  def __hash__(self) -> int:
    return hash((self.network, tuple(self.rates.items()), self.convolve))

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, channels)."""
    return self.network.image_shape

  @property
  def num_classes(self) -> int:
    """Number of logits."""
    return discovery.discover(self.network, 2).logits.shape[1]

  @property
  def sites(self) -> tuple[Site, ...]:
    """The dropout sites, in the order in which the network meets them."""
    # JAX sorts the keys of a dictionary, so the order is the network's.
    names = discovery.discover(self.network, 2).sites
    return tuple(Site(name, self.rates[name]) for name in names)

  @property
  def classifier(self) -> Path | None:
    """Path of the dense layer that gives the logits, whose gradient tells the labels, if known."""
    return discovery.discover(self.network, 2).classifier

  @property
  def convolutions(self) -> tuple[Convolution, ...]:
    """The convolutions that are called once and can be tapped."""
    # Of a single image some networks cannot take statistics.
    found = discovery.discover(self.network, 2).convolutions
    return tuple(
      Convolution(path, *calls[0], apply)
      for path, (apply, calls) in found.items()
      if len(calls) == 1
    )

  def _discover(self, batch_size: int) -> discovery.Discovery:
    with discovery.naming_failures(self.network, f"{batch_size} image(s)"):
      return discovery.discover(self.network, batch_size)

  def dense(self, batch_size: int) -> tuple[DenseLayer, ...]:
    """Returns the dense layers that can be tapped, in the order in which they are called."""
    return tuple(
      DenseLayer(
        path,
        tuple(math.prod(a[:-1]) for a, _ in calls),
        calls[0][0][-1],
        calls[0][1][-1],
        tuple(z for _, z in calls),
      )
      for path, calls in self._discover(batch_size).dense.items()
    )

  def products(self, batch_size: int) -> tuple[DenseLayer, ...]:
    """Returns the layers that multiply rows with a kernel: dense ones and convolutions.

    Args:
      batch_size: number of images.
    """
    found = self._discover(batch_size).convolutions
    shapes = leaves_by_path(discovery.params_shape(self.network))
    layers = list(self.dense(batch_size))
    for path, (convolution, calls) in found.items():
      if convolution.groups > 1:  # a product for each group
        continue
      *size, _, outputs = shapes[(*path, "kernel")].shape
      layers.append(
        DenseLayer(
          path,
          tuple(batch_size * math.prod(z) // outputs for _, z in calls),
          math.prod(shapes[(*path, "kernel")].shape[:-1]),
          outputs,
          tuple((batch_size, *z) for _, z in calls),
          (convolution, tuple(size)),
        )
      )
    return tuple(layers)

  def mask_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each site's mask for a batch."""
    found = self._discover(batch_size).sites
    return {name: shape for name, (_, shape) in found.items()}

  def init(self, key: Key) -> Params:
    """Draws parameters."""
    check_key(key)
    with usual_promotion():
      return self.network.init(key)

  def apply(self, params: Params, masks: Masks | None, images: Images) -> Logits:
    """Computes logits under given masks; a site computes `h * mask / (1 - rate)`.

    Args:
      params: as `init` gives them.
      masks: {site: f[shape]}; None is the evaluation mode, in which a site is the identity.
      images: f[B, H, W, C], normalised.

    Returns:
      f[B, num_classes].

    Raises:
      InputError: the masks are those of other sites or of another batch size.
    """
    return self._call(params, masks, images, None)

  def apply_tapped(
    self,
    params: Params,
    masks: Masks | None,
    images: Images,
    taps: Taps,
    added: Mapping[Path, Added] = MappingProxyType({}),
  ) -> tuple[Logits, Taps]:
    """Computes logits, with something added to the outputs of layers.

    Args:
      params: as `init` gives them.
      masks: as in `apply`.
      images: f[B, H, W, C], normalised.
      taps: what is added, for each call of the layers in it; f[rows, outputs], or of the shape of
        the outputs themselves.
      added: {path of such a layer: `function(inputs, shape)`}, of its inputs as they are and the
        shape of its outputs; what it returns is added to these too.

    Returns:
      The logits, and the inputs of the same calls; f[rows, inputs], or as they are.
    """
    inputs_of: dict[Path, list[jax.Array]] = {path: [] for path in taps}

    def on_linear(layer, inputs, outputs, nested):
      del nested  # such a layer is not among those that can be tapped
      if layer.path not in taps:
        return outputs
      tap = taps[layer.path][len(inputs_of[layer.path])]
      if layer.path in added:
        outputs += added[layer.path](inputs, outputs.shape).astype(outputs.dtype)
      if tap.shape != outputs.shape:
        inputs = inputs.reshape(len(tap), -1)
      # A layer may compute in a type of its own.
      inputs_of[layer.path].append(inputs.astype(tap.dtype))
      return outputs + tap.reshape(outputs.shape).astype(outputs.dtype)

    logits = self._call(params, masks, images, on_linear)
    return logits, {path: tuple(inputs) for path, inputs in inputs_of.items()}

  def as_products(self) -> set[Path]:
    """Returns the paths of the convolutions that are computed as products."""
    found = discovery.discover(self.network, 2).convolutions if self.convolve != "native" else {}
    if self.convolve == "product":
      return set(found)
    platform = jax.default_backend()
    return {path for path, (layer, _) in found.items() if is_faster_as_product(layer, platform)}

  def _call(self, params, masks, images, on_linear, run=None) -> Any:
    name = self.network.name
    layers.check_masks(name, masks, self.rates)

    def drop_at(call):
      assert masks is not None  # without masks, sites are ignored
      mask = jnp.asarray(masks[call.name])
      if mask.shape != call.shape:
        raise InputError(
          f"the mask of site {call.name!r} has shape {mask.shape}; expected {call.shape} for"
          f" {images.shape[0]} images."
        )
      # The rate is the model's, which may be another than the network itself has.
      return drop(call.inputs, mask.astype(call.inputs.dtype), self.rates[call.name])

    images, shape = as_numbers(images), tuple(self.image_shape)
    if run is None and (images.ndim != 4 or tuple(images.shape[1:]) != shape):
      raise InputError(
        f"images have shape {tuple(images.shape)}; expected (B, {', '.join(map(str, shape))}), as"
        f" {name} takes them."
      )
    params = nn.unbox(params)
    discovery.check_params(self.network, params)
    leaves = leaves_by_path(params)
    as_products = self.as_products()

    def compute(layer, inputs, outputs, nested):
      if layer.path in as_products and not nested:
        own = {n: leaves[*layer.path, n] for n in ("kernel", "bias") if (*layer.path, n) in leaves}
        own = {name: leaf.astype(outputs.dtype) for name, leaf in own.items()}
        outputs = layer.convolution.product(own, inputs)
      return outputs if on_linear is None else on_linear(layer, inputs, outputs, nested)

    hook = compute if as_products else on_linear
    hooks = Hooks(ignore_sites if masks is None else drop_at, hook)
    with full_precision(), usual_promotion():
      return (run or self.network.call)(params, images, hooks)


def model_of(network: Network, rates: Mapping[str, float] | None = None) -> DropoutModel:
  """Returns a network with its dropout rates as a model.

  Args:
    network: of any library.
    rates: {site: rate}; those of the network itself if None.

  Raises:
    InputError: it does not return a vector of two logits or more for each image, or a rate is
      out of range.
  """
  found = discovery.discover(network, 2)
  logits = found.logits
  if getattr(logits, "ndim", None) != 2 or logits.shape[0] != 2:
    raise InputError(
      f"{network.name} returns {jax.tree.map(lambda x: x.shape, logits)} for 2 images; expected one"
      " array of logits, (2, num_classes)."
    )
  if not jnp.issubdtype(logits.dtype, jnp.floating):
    raise InputError(
      f"{network.name} returns {logits.dtype}; expected logits of floats, by which the loss has a"
      " gradient."
    )
  if logits.shape[1] < 2:
    raise InputError(
      f"{network.name} returns a single logit an image, whose softmax is always 1 and has no"
      " gradient; expected num_classes of at least 2. Of binary labels use two logits, z and 0."
    )
  if found.is_softmax:
    warnings.warn(
      f"the outputs of {network.name} are a softmax, but are taken as logits, of which the loss"
      " takes the softmax once more. Leave it out, unless the client's loss really did so.",
      stacklevel=3,
    )
  if rates is None:
    return DropoutModel(network, {site: rate for site, (rate, _) in found.sites.items()})
  return DropoutModel(network, dict(rates))


def check_image_shape(image_shape: Any) -> tuple[int, int, int]:
  """Returns `image_shape` as a tuple of three positive integers.

  Args:
    image_shape: (height, width, channels).

  Raises:
    InputError: it is not that.
  """
  try:
    shape = tuple(check_count("a side", n, 1) for n in image_shape)
  except (TypeError, ValueError):
    shape = ()
  if len(shape) != 3:
    raise InputError(
      f"image_shape is {image_shape!r}; expected three positive integers (height, width,"
      " channels), such as (32, 32, 3)."
    )
  return shape


def check_rate(rate: object, where: str = "dropout_rate") -> float:
  """Returns a dropout rate that lies in [0, 1).

  Args:
    rate: the probability of an entry to be dropped.
    where: what the message calls it.

  Raises:
    InputError: it lies outside, or is no number.
  """
  return check_number(
    where,
    rate,
    lambda value: 0 <= value < 1,
    "a number in [0, 1): 0 is no dropout, and 1 would drop everything",
  )
