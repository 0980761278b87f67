"""Local steps of SGD, of which the kernels' way is kept as thin factors.

After steps with the inputs a_s of a dense layer and the derivatives δ_s by its outputs, its kernel
is W - η Σ_s c_s a_sᵀδ_s, where c_s tells how often step s was repeated by the momentum. So the
outputs of the next step are those of W, less η Σ_s c_s (a a_sᵀ) δ_s: no kernel is formed, and what
is sent in the end is thin as well.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxdia.client import LocalUpdate
from jaxdia.core.trees import Path
from jaxdia.core.types import Array, Images, Labels, Masks
from jaxdia.models import DenseLayer

Leaves = dict[Path, Float[Array, "..."]]


class Rows(NamedTuple):
  """The kernel gradient of a dense layer, `inputs.T @ deltas`.

  Attributes:
    inputs: f[rows, inputs], of the layer.
    deltas: f[rows, outputs], derivatives by its outputs.
  """

  inputs: Float[Array, "rows inputs"]
  deltas: Float[Array, "rows outputs"]


# gradient(leaves, {path: what is to be added to the kernel}, masks, images, labels)
# -> (gradient by the leaves, {path: kernel gradient})
StepGradient = Callable[
  [Leaves, dict[Path, Rows], Masks | None, Images, Labels], tuple[Leaves, dict[Path, Rows]]
]


def local_rows(
  gradient: StepGradient,
  leaves: Leaves,
  layers: Sequence[DenseLayer],
  masks: Masks | None,
  images: Images,
  labels: Labels,
  local: LocalUpdate,
) -> tuple[Leaves, dict[Path, Rows]]:
  """Returns what clients send after local steps of SGD; see `jaxdia.client.local_gradient`.

  Args:
    gradient: of one step.
    leaves: of the params, those whose gradient is formed.
    layers: those whose kernel gradients are not.
    masks: {site: f[draws, shape]}; None for the network without dropout.
    images: f[B, H, W, C], of all clients.
    labels: i[B], or f[B, num_classes].
    local: what the clients do; its optimiser is SGD.

  Returns:
    The formed part, and the kernel gradients of the layers.
  """
  dtype = images.dtype
  rate, momentum = (jnp.asarray(x, dtype) for x in (local.learning_rate, local.momentum))
  a_client = local.epochs * local.steps
  # By which factor the gradient of step s has moved the weights before step t of the same client:
  # 1 + μ + μ² ..., as often as it was repeated.
  begin, now = np.arange(local.draws), np.arange(local.draws)[:, None]
  repeats = np.where(now // a_client == begin // a_client, np.maximum(now - begin, 0), 0)

  def factor(repeats):
    return (1 - momentum ** jnp.asarray(repeats, dtype)) / (1 - momentum)

  factors = factor(repeats)

  def one(carry, given):
    (moved, trace, sent), history = carry
    number, factors, masks, chosen = given
    again = (number % a_client != 0).astype(dtype)  # 0 at the first step of a client
    moved, trace = ({path: again * x for path, x in tree.items()} for tree in (moved, trace))
    here = {path: leaf - rate * moved[path] for path, leaf in leaves.items()}
    by_step = -rate * factors[:, None, None]
    added = {
      path: Rows(_flat(rows.inputs), _flat(by_step * rows.deltas)) for path, rows in history.items()
    }
    formed, found = gradient(here, added, masks, images[chosen], labels[chosen])
    trace = {path: momentum * x + formed[path] for path, x in trace.items()}
    moved = {path: x + trace[path] for path, x in moved.items()}
    sent = {path: x + trace[path] for path, x in sent.items()}
    history = {
      path: Rows(*(old.at[number].set(new) for old, new in zip(rows, found[path], strict=True)))
      for path, rows in history.items()
    }
    return ((moved, trace, sent), history), None

  def zeros(layer):
    shape = (local.draws, sum(layer.rows))
    return Rows(jnp.zeros((*shape, layer.inputs), dtype), jnp.zeros((*shape, layer.outputs), dtype))

  ways = tuple({path: jnp.zeros_like(leaf) for path, leaf in leaves.items()} for _ in range(3))
  start = (ways, {layer.path: zeros(layer) for layer in layers})
  given = (jnp.arange(local.draws), factors, masks, local.indices(images.shape[0]))
  one = jax.checkpoint(one, prevent_cse=False)
  ((_, _, sent), history), _ = jax.lax.scan(one, start, given)
  left = factor(a_client - begin % a_client)[:, None, None] / local.draws
  return (
    {path: way / local.draws for path, way in sent.items()},
    {path: Rows(_flat(r.inputs), _flat(left * r.deltas)) for path, r in history.items()},
  )


def _flat(rows: jax.Array) -> jax.Array:
  return rows.reshape(-1, rows.shape[-1])
