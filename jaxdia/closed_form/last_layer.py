"""The dense layer that gives the logits, of networks that do not tell their layers too."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jaxdia.closed_form.first_layer import name_of
from jaxdia.closed_form.structure import full_masks, model_to_try, probing_params
from jaxdia.core.trees import Path, leaves_by_path, with_leaves
from jaxdia.core.types import Array
from jaxdia.models import Network, discovery

# What rounding may make of a product, relative to its size: a network may compute in float32.
_TOLERANCE = 1e-5


class LastLayer(NamedTuple):
  """A dense layer whose outputs are the logits.

  Attributes:
    kernel: path of its kernel, which may have any name.
    bias: path of its bias, if it has one.
    turned: whether the kernel is [outputs, inputs].
  """

  kernel: Path
  bias: Path | None
  turned: bool = False

  @property
  def name(self) -> str:
    """What messages call the layer."""
    return name_of(self.kernel, self.bias)

  def read(self, tree: Any, num_classes: int) -> dict[str, Shaped[Array, "..."]]:
    """Returns its part of a gradient or of params.

    Args:
      tree: of the whole network.
      num_classes: number of logits.

    Returns:
      {"kernel": f[inputs, num_classes]}, with "bias" if the layer has one; without what is frozen.
    """
    leaves: Mapping[Path, Any] = leaves_by_path(tree)
    found = {}
    if leaves.get(self.kernel) is not None:
      kernel = leaves[self.kernel]
      found["kernel"] = kernel.T if self.turned else kernel.reshape(-1, num_classes)
    if self.bias is not None and leaves.get(self.bias) is not None:
      found["bias"] = leaves[self.bias]
    return found


@functools.lru_cache
def find_last_layer(network: Network) -> LastLayer | None:
  """Finds the dense layer that gives the logits.

  A network that tells its layers has said which one it is. Of plain functions it is tried: with
  random numbers u in place of the derivatives by the logits, the derivative by its kernel is
  `h ⊗ u`, whatever u and the kernel are, and that by its bias is u.

  Args:
    network: of a model.

  Returns:
    The layer; None if there is none.
  """
  found = discovery.discover(network, 2)
  if found.classifier is not None:
    path = found.classifier
    with_bias = (*path, "bias") in leaves_by_path(discovery.params_shape(network))
    return LastLayer((*path, "kernel"), (*path, "bias") if with_bias else None)
  if found.dense:  # the logits are not the outputs of one of them
    return None
  with jax.ensure_compile_time_eval(), jax.enable_x64(True):
    return _try(network, found.logits.shape[1])


def _try(network, num_classes) -> LastLayer | None:
  model = model_to_try(network)
  params = probing_params(model)
  rng = np.random.default_rng(0)
  # Of a single image some networks cannot take statistics: u are the derivatives of the first.
  images = jnp.asarray(rng.standard_normal((2, *model.image_shape)))
  masks = full_masks(model, 2)
  ours = rng.standard_normal((2, num_classes))

  @jax.jit
  def derivatives(params, u):
    gradient = jax.grad(lambda p: jnp.sum(u * model.apply(p, masks, images)[0]))(params)
    return leaves_by_path(gradient)

  leaves = leaves_by_path(params)
  each = [(u, {p: np.asarray(x) for p, x in derivatives(params, u).items()}) for u in ours]
  biases = [
    path
    for path, leaf in leaves.items()
    if leaf.shape == (num_classes,) and all(_close(found[path], u) for u, found in each)
  ]
  for path, leaf in leaves.items():
    for turned in (False, True):
      if leaf.ndim != 2 or leaf.shape[0 if turned else 1] != num_classes:
        continue
      told = [_inputs(found[path].T if turned else found[path], u) for u, found in each]
      changed = with_leaves(params, leaves | {path: leaf * leaf - 0.1})
      again = np.asarray(derivatives(changed, ours[0])[path])
      told.append(_inputs(again.T if turned else again, ours[0]))
      if all(h is not None and _close(h, told[0]) for h in told) and np.any(told[0]):
        together = sorted(biases, key=lambda bias: bias[:-1] != path[:-1])
        return LastLayer(path, together[0] if together else None, turned)
  return None


def _inputs(kernel: np.ndarray, u: np.ndarray) -> np.ndarray | None:
  """Returns h of a derivative that is h ⊗ u; None if it is not."""
  h = kernel @ u / (u @ u)
  return h if _close(np.outer(h, u), kernel) else None


def _close(a: np.ndarray, b: np.ndarray) -> bool:
  return bool(np.max(np.abs(a - b)) <= _TOLERANCE * np.max(np.abs(b)))
