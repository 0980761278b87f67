"""How far a dummy gradient is from the gradient that the client sent.

The kernel gradient of a dense layer need not be formed to be compared. With the
inputs a of its calls and the derivatives δ of the loss by its outputs, one row an
image and position, the kernel gradient is G = Σ_rows aᵀδ, so

    <G, T> = Σ (a T) ∘ δ        |G|² = Σ (a aᵀ) ∘ (δ δᵀ)

(in differential privacy known as ghost clipping; mixed by cost for each layer: Bu
et al. 2022). The client's T itself has no more rank than its batch had rows, so it
is kept as thin factors. What is not a dense layer is formed.
"""

import functools
import typing
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from jaxdia.client import (
  CROSS_ENTROPY,
  LocalUpdate,
  Loss,
  Observation,
  local_gradient,
  steps_of,
)
from jaxdia.client.defences import Defence, Step, identity
from jaxdia.core.precision import full_precision
from jaxdia.core.trees import Path, leaves_by_path, static, value_tree, with_leaves
from jaxdia.core.types import Array, Gradient, Images, Labels, Masks, Params, Scalar
from jaxdia.gradients.distances import Comparison
from jaxdia.gradients.local_steps import Rows, local_rows
from jaxdia.models import Averages, DenseLayer, DropoutModel

Method = Literal["auto", "formed", "factored"]
METHODS = typing.get_args(Method)


class Factors(NamedTuple):
  """A matrix of low rank, `left @ right.T`.

  Attributes:
    left: f[inputs, rank].
    right: f[outputs, rank].
  """

  left: Float[Array, "inputs rank"]
  right: Float[Array, "outputs rank"]


class Target(NamedTuple):
  """A client's gradient, prepared to be matched.

  Attributes:
    formed: the gradient without the kernels that are not formed; {path: array}.
    kernels: {path of a dense layer: its kernel gradient, whole or as `Factors`}.
    squared_norm: f[], of the whole gradient.
    noise: f[], the squared norm of what a defence added to it at random; None if it did not.
  """

  formed: dict[Path, Float[Array, "..."]]
  kernels: dict[Path, Float[Array, "_ _"] | Factors]
  squared_norm: Scalar
  noise: Scalar | None = None


@value_tree
class Prepared:
  """An observation whose gradient is prepared to be matched.

  Attributes:
    params: see `jaxdia.client.Observation`.
    target: the gradient.
    labels: as in the observation.
    mean: as in the observation.
    std: as in the observation.
    batch_size: as in the observation.
    loss: as in the observation.
    averages: as in the observation.
    local: as in the observation.
    defence: as in the observation; its numbers are arrays.
  """

  params: Params
  target: Target
  labels: Labels | None
  mean: Float[Array, " channels"]
  std: Float[Array, " channels"]
  batch_size: int = static()
  loss: Loss = static(default=CROSS_ENTROPY)
  averages: dict[str, Averages] | None = None
  local: LocalUpdate | None = None
  defence: Defence = identity

  # Arrays have no hash; so Python's own message names this type, and not that of a field.
  __hash__ = None  # pyright: ignore[reportAssignmentType]


def choose_layers(
  model: DropoutModel,
  batch_size: int,
  method: Method,
  local: LocalUpdate | None = None,
  defence: Defence = identity,
) -> tuple[DenseLayer, ...]:
  """Chooses the dense layers whose kernel gradients are not formed.

  Args:
    model: the network.
    batch_size: number of images.
    method: "factored" takes all that the model can tap, "formed" none, "auto"
      those for which it costs less.
    local: local steps; None for one gradient.
    defence: of the client; one that dummy gradients are adapted to needs all of them formed.

  Returns:
    The layers, with the rows of one step; none for a model whose layers are not known.
  """
  if method == "formed" or defence.adapts:
    return ()
  if local and local.optimizer != "sgd":  # Adam's way is not thin
    return ()
  draws, each = steps_of(local, batch_size)
  layers = model.products(each)
  return layers if method == "factored" else tuple(x for x in layers if _is_cheaper(x, draws))


def _is_cheaper(layer: DenseLayer, draws: int) -> bool:
  rows, size = draws * sum(layer.rows), layer.inputs * layer.outputs
  rank = min(rows, layer.inputs, layer.outputs)
  # Multiplications for the value and its derivative. Formed are G and, of its derivative, two
  # products; G and T and that derivative go through memory, which costs about as much as 24
  # multiplications an entry.
  formed = 3 * rows * size + 24 * draws * size
  factored = 2 * rows * (rows + rank) * (layer.inputs + layer.outputs)
  return factored < formed


def prepare(
  model: DropoutModel, observation: Observation, method: Method = "auto", compress: bool = True
) -> Prepared:
  """Prepares an observation's gradient to be matched many times.

  Args:
    model: the network.
    observation: of one client.
    method: see `choose_layers`.
    compress: whether to look for thin factors of the kernels' gradients, which
      needs concrete values; otherwise they are kept whole.

  Returns:
    The observation with a `Target` in place of the gradient. Its shapes are those of all
    observations of this batch size, but for kernels that are not of low rank (of a noised
    gradient, say), which are kept whole.
  """
  size, dtype = observation.batch_size, observation.dtype
  defence = jax.tree.map(lambda number: jnp.asarray(number, dtype), observation.defence)
  gradient = leaves_by_path(defence.clean(observation.gradient))
  squared_norm = sum(_dot(leaf, leaf) for leaf in gradient.values())
  noise = defence.noise(gradient, size)
  kernels = {}
  local = observation.local
  draws, _ = steps_of(local, size)
  for layer in choose_layers(model, size, method, local, defence):
    kernel = gradient.pop((*layer.path, "kernel"), None)
    if kernel is None:  # of a frozen layer
      continue
    kernel = kernel.reshape(layer.inputs, layer.outputs)  # it may have more axes than a matrix
    factors = factorize(kernel, draws * sum(layer.rows)) if compress else None
    kernels[layer.path] = kernel if factors is None else factors
  names = ("params", "labels", "mean", "std", "averages", "local")
  fields = {name: getattr(observation, name) for name in names}
  target = Target(gradient, kernels, squared_norm, noise)
  facts = {"batch_size": observation.batch_size, "loss": observation.loss}
  return Prepared(target=target, defence=defence, **facts, **fields)


def factorize(matrix: Float[jax.Array | np.ndarray, "inputs outputs"], rank: int) -> Factors | None:
  """Returns thin factors of a matrix, if it has no more than the given rank.

  Args:
    matrix: f[inputs, outputs], concrete.
    rank: the largest that is worth it.

  Returns:
    Factors that reproduce the matrix to a few units of rounding, with `rank` columns, of which
    those beyond its numerical rank are zero; or None if that rank is higher than `rank`, if the
    matrix is not of single or double precision, or if the factors would be no thinner than it.
  """
  inputs, outputs = matrix.shape
  if rank * (inputs + outputs) >= inputs * outputs or matrix.dtype not in (
    jnp.float32,
    jnp.float64,
  ):
    return None
  matrix = np.asarray(matrix)  # on the host, where nothing needs to be compiled
  if not np.isfinite(matrix).all():  # as little a number, and of the shape of all others
    return Factors(*(jnp.full((n, rank), jnp.nan, matrix.dtype) for n in (inputs, outputs)))
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
  missing = rank - enough
  return jax.tree.map(lambda x: jnp.asarray(np.pad(x, ((0, 0), (0, missing)))), factors)


def compare(
  model: DropoutModel,
  params: Params,
  target: Target,
  masks: Masks | None,
  images: Images,
  labels: Labels,
  loss: Loss,
  local: LocalUpdate | None = None,
  defence: Defence = identity,
) -> Comparison:
  """Compares the gradient of a dummy batch with the client's.

  Args:
    model: the network.
    params: its parameters.
    target: the client's gradient, prepared.
    masks: of the dummy batch; None for the evaluation mode.
    images: f[B, H, W, C], of the dummy batch.
    labels: i[B], or f[B, num_classes] probabilities.
    loss: that the client descends.
    local: its local steps; None for one gradient.
    defence: of the client, which the dummy gradient is adapted to if it is formed whole.

  Returns:
    The comparison; differentiable by masks, images and labels.
  """
  layers = []
  if target.kernels:
    _, each = steps_of(local, images.shape[0])
    layers = [x for x in model.products(each) if x.path in target.kernels]
  leaves = leaves_by_path(params)
  fixed = {path: leaves[path] for path in leaves if path not in target.formed}
  free = {path: leaves[path] for path in target.formed}
  dtype = images.dtype
  taps = {x.path: tuple(jnp.zeros(shape, dtype) for shape in x.shapes) for x in layers}

  def step(free, moved, masks, images, labels):
    added = {x.path: functools.partial(_added, x, moved[x.path]) for x in layers if moved}

    def tapped_loss(free, taps):
      merged = with_leaves(params, fixed | free)
      if not taps:
        return loss(model.apply(merged, masks, images), labels), {}
      logits, inputs = model.apply_tapped(merged, masks, images, taps, added)
      return loss(logits, labels), inputs

    (formed, deltas), inputs = jax.grad(tapped_loss, argnums=(0, 1), has_aux=True)(free, taps)
    rows = {
      x.path: Rows(
        jnp.concatenate([x.input_rows(a) for a in inputs[x.path]]),
        jnp.concatenate([x.output_rows(delta) for delta in deltas[x.path]]),
      )
      for x in layers
    }
    return formed, rows

  batch = (masks, images, labels)
  with full_precision():
    if local is None:
      formed, rows = step(free, {}, *batch)
    elif local.optimizer == "sgd":
      formed, rows = local_rows(step, free, layers, *batch, local)
    else:

      def gradient(free, *batch):
        return step(free, {}, *batch)[0]

      formed, rows = local_gradient(gradient, free, *batch, local), {}
    if not layers:
      # Trees like the params, with None for a frozen layer, as the client's own gradient.
      own, sent = (
        with_leaves(params, {path: found.get(path) for path in leaves})
        for found in (formed, target.formed)
      )
      adapted = leaves_by_path(defence.adapt(own, sent, Step(model, params, *batch, loss)))
      formed = {path: adapted[path] for path in formed}
    inner = sum(_dot(formed[path], target.formed[path]) for path in formed)
    squared_norm = sum(_dot(g, g) for g in formed.values())
    products = []
    for layer in layers:
      kernel = target.kernels[layer.path]
      a, delta = rows[layer.path]
      if isinstance(kernel, Factors):
        layer_inner, layer_norm = _match(a, delta, jax.lax.stop_gradient(kernel))
        kernel_norm = _dot(kernel.left.T @ kernel.left, kernel.right.T @ kernel.right)
      else:
        zero = Factors(jnp.zeros((layer.inputs, 0), dtype), jnp.zeros((layer.outputs, 0), dtype))
        layer_inner, layer_norm = _dot(a @ kernel, delta), _match(a, delta, zero)[1]
        kernel_norm = _dot(kernel, kernel)
      inner += layer_inner
      squared_norm += layer_norm
      products.append((layer_inner, layer_norm, kernel_norm))
    c = inner / jnp.where(squared_norm > 0, squared_norm, 1)
    left = (c * formed[path] - target.formed[path] for path in formed)
    squared_distance = sum(_dot(x, x) for x in left)
    for layer_inner, layer_norm, kernel_norm in products:
      squared_distance += c**2 * layer_norm - 2 * c * layer_inner + kernel_norm
  return Comparison(inner, squared_norm, target.squared_norm, squared_distance)


def _added(layer: DenseLayer, moved: Rows, inputs: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns what a change of a layer's kernel adds to its outputs."""
  rows = layer.input_rows(inputs).astype(moved.inputs.dtype)
  return layer.of_rows((rows @ moved.inputs.T) @ moved.deltas, shape)


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


def layer_gradient(gradient: Gradient, path: Path) -> dict[str, Shaped[Array, "..."]]:
  """Returns the gradient of one layer, or its parameters if given those.

  Args:
    gradient: of the whole network.
    path: of the layer.

  Returns:
    {"kernel": f[inputs, outputs]}, with "bias" if the layer has one; empty for a frozen layer.
  """
  leaves = leaves_by_path(gradient).items()
  return {name[-1]: leaf for name, leaf in leaves if name[:-1] == path}


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.sum(a * b)
