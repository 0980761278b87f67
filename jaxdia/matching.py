"""How far a dummy gradient is from the gradient that the client sent.

The kernel gradient of a dense layer need not be formed to be compared. With the
inputs a of its calls and the derivatives δ of the loss by its outputs, one row an
image and position, the kernel gradient is G = Σ_rows aᵀδ, so

    <G, T> = Σ (a T) ∘ δ        |G|² = Σ (a aᵀ) ∘ (δ δᵀ)

(in differential privacy known as ghost clipping; mixed by cost for each layer: Bu
et al. 2022). The client's T itself has no more rank than its batch had rows, so it
is kept as thin factors. What is not a dense layer is formed.
"""

import dataclasses
import typing
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdia.client import Observation, full_precision, loss_of_logits
from jaxdia.core.errors import InputError
from jaxdia.core.types import Gradient, Images, Labels, Masks, Params
from jaxdia.models import DenseLayer, DropoutModel

Method = Literal["auto", "formed", "factored"]
METHODS = typing.get_args(Method)
_Path = tuple[str, ...]


class Factors(NamedTuple):
  """A matrix of low rank, `left @ right.T`.

  Attributes:
    left: f[inputs, rank].
    right: f[outputs, rank].
  """

  left: jax.Array
  right: jax.Array


class Target(NamedTuple):
  """A client's gradient, prepared to be matched.

  Attributes:
    formed: the gradient without the kernels that are not formed; {path: array}.
    kernels: {path of a dense layer: its kernel gradient, whole or as `Factors`}.
    squared_norm: f[], of the whole gradient.
  """

  formed: dict[_Path, jax.Array]
  kernels: dict[_Path, jax.Array | Factors]
  squared_norm: jax.Array


def suits(distance: str, method: Method) -> Method:
  """Returns the method by which a distance can be computed to float tolerance.

  |g|² - 2<g, T> + |T|² is a small difference of large numbers near the solution,
  so the squared distance is taken of formed gradients; the cosine needs no such
  difference.

  Args:
    distance: a key of `DISTANCES`.
    method: that is wanted.
  """
  return "formed" if distance == "squared_l2" and method == "auto" else method


class Comparison(NamedTuple):
  """What a dummy gradient g and a target T have to do with each other; each f[].

  Attributes:
    inner: <g, T>.
    squared_norm: |g|².
    target_squared_norm: |T|².
    squared_distance: |g - T|².
  """

  inner: jax.Array
  squared_norm: jax.Array
  target_squared_norm: jax.Array
  squared_distance: jax.Array


def cosine_distance(comparison: Comparison) -> jax.Array:
  """Returns 1 - cosine of the angle between two gradients (Geiping et al. 2020).

  Args:
    comparison: of the gradients, each taken as one vector.

  Returns:
    f[], in [0, 2].
  """
  norms = jnp.sqrt(comparison.squared_norm) * jnp.sqrt(comparison.target_squared_norm)
  return 1 - comparison.inner / (norms + 1e-8)


def squared_l2_distance(comparison: Comparison) -> jax.Array:
  """Returns the squared Euclidean distance of two gradients (Zhu et al. 2019)."""
  return comparison.squared_distance


DISTANCES = {"cosine": cosine_distance, "squared_l2": squared_l2_distance}


def choose_layers(model: DropoutModel, batch_size: int, method: Method) -> tuple[DenseLayer, ...]:
  """Chooses the dense layers whose kernel gradients are not formed.

  Args:
    model: the network.
    batch_size: number of images.
    method: "factored" takes all that the model can tap, "formed" none, "auto"
      those for which it costs less.

  Returns:
    The layers; none for a model that cannot be tapped.
  """
  if method == "formed" or model.dense is None:
    return ()
  layers = model.dense(batch_size)
  return layers if method == "factored" else tuple(x for x in layers if _is_cheaper(x))


def _is_cheaper(layer: DenseLayer) -> bool:
  rows, size = sum(layer.rows), layer.inputs * layer.outputs
  rank = min(rows, layer.inputs, layer.outputs)
  # Multiplications for the value and its derivative. Formed are G and, of its derivative, two
  # products; G and T and that derivative go through memory, which costs about as much as 24
  # multiplications an entry.
  formed = 3 * rows * size + 24 * size
  factored = 2 * rows * (rows + rank) * (layer.inputs + layer.outputs)
  return factored < formed


def prepare(
  model: DropoutModel, observation: Observation, method: Method = "auto", compress: bool = True
) -> Observation:
  """Prepares an observation's gradient to be matched many times.

  Args:
    model: the network.
    observation: of one client.
    method: see `choose_layers`.
    compress: whether to look for thin factors of the kernels' gradients, which
      needs concrete values; otherwise they are kept whole.

  Returns:
    The observation with a `Target` in place of the gradient. Already prepared
    ones are returned as they are.
  """
  if isinstance(observation.gradient, Target):
    return observation
  gradient = flatten(observation.gradient)
  squared_norm = sum(_dot(leaf, leaf) for leaf in gradient.values())
  kernels = {}
  for layer in choose_layers(model, observation.batch_size, method):
    kernel = gradient.pop((*layer.path, "kernel"))
    factors = factorize(kernel, sum(layer.rows)) if compress else None
    kernels[layer.path] = kernel if factors is None else factors
  return dataclasses.replace(observation, gradient=Target(gradient, kernels, squared_norm))


def prepare_alike(
  model: DropoutModel, observations: list[Observation], method: Method = "auto"
) -> list[Observation]:
  """Prepares observations so that one compiled program serves all.

  Args:
    model: the network.
    observations: of one model and batch size.
    method: see `choose_layers`.

  Returns:
    The prepared observations. A kernel that is not of low rank for all of them
    (of a noised gradient, say) is kept whole for all.

  Raises:
    InputError: some were prepared before, in different ways.
  """
  prepared = [prepare(model, o, method) for o in observations]
  kernels = [o.gradient.kernels for o in prepared]
  if any(set(k) != set(kernels[0]) for k in kernels):
    raise InputError("observations were prepared by different methods; prepare them together.")
  whole = {path for k in kernels for path, v in k.items() if not isinstance(v, Factors)}
  ranks = {p: max(k[p].left.shape[1] for k in kernels) for p in kernels[0] if p not in whole}

  def unify(path, kernel):
    if path in whole:
      return _whole(kernel)
    missing = ranks[path] - kernel.left.shape[1]
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, missing))), kernel)

  return [
    dataclasses.replace(
      o,
      gradient=o.gradient._replace(kernels={p: unify(p, k) for p, k in o.gradient.kernels.items()}),
    )
    for o in prepared
  ]


def factorize(matrix: jax.Array, rank: int) -> Factors | None:
  """Returns thin factors of a matrix, if it has no more than the given rank.

  Args:
    matrix: f[inputs, outputs], concrete.
    rank: the largest that is worth it.

  Returns:
    Factors of the matrix's numerical rank that reproduce it to a few units of
    rounding, or None if that rank is higher than `rank`, if the matrix is not of
    single or double precision, or if the factors would be no thinner than it.
  """
  inputs, outputs = matrix.shape
  if rank * (inputs + outputs) >= inputs * outputs or matrix.dtype not in (
    jnp.float32,
    jnp.float64,
  ):
    return None
  matrix = np.asarray(matrix)  # on the host, where nothing needs to be compiled
  if not np.isfinite(matrix).all():
    return None
  # A random sketch with a few more columns than the rank spans the column space.
  sketch = np.random.default_rng(0).standard_normal((outputs, min(rank + 8, inputs, outputs)))
  basis, _ = np.linalg.qr(matrix @ sketch.astype(matrix.dtype))
  u, s, vt = np.linalg.svd(basis.T @ matrix, full_matrices=False)
  # What is left out by keeping the first 1, 2, ... columns.
  left_out = np.sqrt(np.cumsum(np.square(s[::-1]))[::-1])[1:rank]
  unit = np.finfo(matrix.dtype).eps * np.linalg.norm(matrix)
  enough = 1 + int(np.sum(left_out > unit))
  factors = Factors(basis @ (u * s)[:, :enough], vt[:enough].T)
  if np.linalg.norm(matrix - factors.left @ factors.right.T) > 50 * unit:
    return None
  return jax.tree.map(jnp.asarray, factors)


def compare(
  model: DropoutModel,
  params: Params,
  target: Target,
  masks: Masks,
  images: Images,
  labels: Labels,
) -> Comparison:
  """Compares the gradient of a dummy batch with the client's.

  Args:
    model: the network.
    params: its parameters.
    target: the client's gradient, prepared.
    masks: of the dummy batch.
    images: f[B, H, W, C], of the dummy batch.
    labels: i[B], or f[B, num_classes] probabilities.

  Returns:
    The comparison; differentiable by masks, images and labels.
  """
  layers = []
  if target.kernels:
    layers = [x for x in model.dense(images.shape[0]) if x.path in target.kernels]
  leaves = flatten(params)
  fixed = {path: leaves[path] for path in leaves if path not in target.formed}
  free = {path: leaves[path] for path in target.formed}
  dtype = images.dtype
  taps = {x.path: tuple(jnp.zeros((rows, x.outputs), dtype) for rows in x.rows) for x in layers}

  def loss(free, taps):
    merged = unflatten(params, fixed | free)
    if not taps:
      return loss_of_logits(model.apply(merged, masks, images), labels), {}
    logits, inputs = model.apply_tapped(merged, masks, images, taps)
    return loss_of_logits(logits, labels), inputs

  with full_precision():
    (formed, deltas), inputs = jax.grad(loss, argnums=(0, 1), has_aux=True)(free, taps)
    inner = sum(_dot(formed[path], target.formed[path]) for path in formed)
    squared_norm = sum(_dot(g, g) for g in formed.values())
    squared_distance = sum(
      _dot(d, d) for d in (formed[path] - target.formed[path] for path in formed)
    )
    for layer in layers:
      kernel = target.kernels[layer.path]
      a, delta = (jnp.concatenate(x[layer.path]) for x in (inputs, deltas))
      if isinstance(kernel, Factors):
        layer_inner, layer_norm = _match(a, delta, jax.lax.stop_gradient(kernel))
        kernel_norm = _dot(kernel.left.T @ kernel.left, kernel.right.T @ kernel.right)
      else:
        zero = Factors(jnp.zeros((layer.inputs, 0), dtype), jnp.zeros((layer.outputs, 0), dtype))
        layer_inner, layer_norm = _dot(a @ kernel, delta), _match(a, delta, zero)[1]
        kernel_norm = _dot(kernel, kernel)
      inner += layer_inner
      squared_norm += layer_norm
      squared_distance += layer_norm - 2 * layer_inner + kernel_norm
  return Comparison(inner, squared_norm, target.squared_norm, squared_distance)


@jax.custom_jvp
def _match(a: jax.Array, delta: jax.Array, target: Factors) -> tuple[jax.Array, jax.Array]:
  """Returns <G, T> and |G|² of the kernel gradient G = aᵀδ and a constant T."""
  inner = _dot(a @ target.left, delta @ target.right)
  return inner, _dot(a @ a.T, delta @ delta.T)


@_match.defjvp
def _match_derivative(primals, tangents):
  # Differentiated as it stands, a aᵀ would cost two products more than it need: its derivative
  # by one factor is that by the other, transposed, and so are those of δ δᵀ.
  a, delta, (left, right) = primals
  da, ddelta, _ = tangents
  a_left, delta_right, a_a, delta_delta = a @ left, delta @ right, a @ a.T, delta @ delta.T
  inner = _dot(da @ left, delta_right) + _dot(a_left, ddelta @ right)
  norm = 2 * (_dot(da @ a.T, delta_delta) + _dot(a_a, ddelta @ delta.T))
  return (_dot(a_left, delta_right), _dot(a_a, delta_delta)), (inner, norm)


def layer_gradient(gradient: Gradient | Target, path: tuple[str, ...]) -> dict[str, jax.Array]:
  """Returns the gradient of one dense layer.

  Args:
    gradient: of the whole network, prepared or not.
    path: of the layer.

  Returns:
    {"kernel": f[inputs, outputs]}, with "bias" if the layer has one.
  """
  leaves = gradient.formed if isinstance(gradient, Target) else flatten(gradient)
  layer = {name[-1]: leaf for name, leaf in leaves.items() if name[:-1] == path}
  if "kernel" not in layer:
    layer["kernel"] = _whole(gradient.kernels[path])
  return layer


def _whole(kernel: jax.Array | Factors) -> jax.Array:
  if not isinstance(kernel, Factors):
    return kernel
  with full_precision():
    return kernel.left @ kernel.right.T


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.sum(a * b)


def flatten(tree: Gradient) -> dict[_Path, Any]:
  """Returns the leaves of params, or of a gradient, by their paths."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {tuple(str(getattr(k, "key", k)) for k in path): leaf for path, leaf in leaves}


def unflatten(like: Params, leaves: dict[_Path, Any]) -> Params:
  """Returns a tree like the given one, with leaves by their paths."""
  return jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in flatten(like)])
