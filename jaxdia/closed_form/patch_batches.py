"""The images of a vision transformer's batch, patch by patch, without a search.

`patch_rows.py` finds patches and masks of all images at each position. Which of them are of one
image, attention could only tell if its heads were wider than there are tokens; here those that go
on smoothly at their borders are put together, which is likely and no proof.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer
from scipy.optimize import linear_sum_assignment

from jaxdia.client import Observation
from jaxdia.closed_form.found import Found
from jaxdia.closed_form.patch_rows import PatchRow, find_patch_rows, smooth_prior
from jaxdia.closed_form.patches import Patching
from jaxdia.closed_form.span import find_normalisation, find_span, inputs_behind
from jaxdia.closed_form.tokens.sentences import assign
from jaxdia.core.errors import InputError
from jaxdia.core.trees import Path, leaves_by_path
from jaxdia.core.types import Gradient, Params
from jaxdia.models import DropoutModel, expected_masks
from jaxdia.models.hooks import Hooks

# Of all rows, so many must be found for images to be put together.
_LEAST_FOUND = 0.8


class PatchBatch(NamedTuple):
  """Images that were put together.

  Attributes:
    images: f64[B, H, W, C], normalised; a patch that was not found is the mean of those around it.
    masks: f64[B, tokens, width] of the site, with NaN where a row was not found.
    found: share of the rows.
  """

  images: Float[np.ndarray, "batch height width channels"]
  masks: Float[np.ndarray, "batch tokens width"]
  found: float


def use_patch_batch(
  model: DropoutModel,
  patching: Patching,
  observation: Observation,
  gradient: Gradient,
  found: Found,
) -> str:
  """Notes the images that patches of a batch tell; returns how well, or why not."""
  size = observation.batch_size
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), observation.params)
  batch = _solve(model, patching, params, gradient, size)
  if isinstance(batch, str):
    return batch
  batch = _match_labels(model, patching, batch, params, gradient, np.asarray(found.parts.labels))
  for number, image in enumerate(batch.images):
    found.set_image(number, image, 1 - batch.found, determined=False)
    kept = batch.masks[number].ravel()
    entries = np.where(np.isnan(kept), -1, np.arange(kept.size))
    found.set_mask(patching.site, number, entries, kept)
  return (
    f"{batch.found:.0%} of the patches of {size} images were found; which are of one image is told"
    " by smooth borders alone"
  )


def _solve(
  model: DropoutModel, patching: Patching, params: Params, gradient: Gradient, size: int
) -> PatchBatch | str:
  """Returns the images of a batch, or why they were not found."""
  if patching.site is None:
    return "no dropout follows the patches, so their masks do not tell them apart"
  offsets, path = _look(model, patching, params)
  tokens, width = offsets.shape
  leaves, sent = leaves_by_path(params), leaves_by_path(gradient)
  kernel = np.asarray(leaves[patching.kernel], np.float64).reshape(-1, width)
  spare = width - size * tokens - len(kernel)
  if path is None or (*path, "kernel") not in sent or patching.embedding not in sent:
    return "no dense layer follows the patches whose gradient was sent"
  if spare < 2:
    return (
      f"{size} images of {tokens} tokens fill the width of {width}: with patches of"
      f" {len(kernel)} numbers nothing is left that tells masks"
    )
  span = find_span([np.asarray(sent[*path, "kernel"]).reshape(width, -1)], size * tokens)
  if span is None:
    return f"the rows of {size} images do not stand out of the noise"

  def after(rows):
    images = jnp.zeros((len(rows), *model.image_shape))

    def call(hooks):
      model.network.call(params, images, hooks)

    return inputs_behind(call, patching.site, path, rows)

  try:
    is_normalised, scale, shift = find_normalisation(after, width, "/".join(path))
  except InputError as error:
    return str(error)
  if is_normalised:
    span = span.extended(np.stack([scale, shift], axis=1))
  sums = np.asarray(sent[patching.embedding], np.float64).reshape(tokens, width)
  given = sums if np.mean(sums == 0) > 0.5 * model.rates[patching.site] ** size else None
  rows = _rows(model, span, offsets * scale, kernel * scale, given, size, patching)
  found = sum(map(len, rows)) / (size * len(patching.pixels))
  if found < _LEAST_FOUND:
    return (
      f"{found:.0%} of the patches of {size} images were found: {spare} equations for a mask of"
      f" {width} entries are too few at this dropout rate"
    )
  return _put_together(model, patching, rows, size, found, width)


def _rows(model, span, offsets, kernel, sums, size, patching) -> list[list[PatchRow]]:
  """Returns the rows of all tokens that have a patch, and none of the others."""
  last = patching.first + len(patching.pixels)
  of_patches = slice(patching.first, last)
  places = np.stack(np.unravel_index(patching.pixels[0], model.image_shape), axis=-1)
  rows: list[list[PatchRow]] = [[] for _ in offsets]
  rows[of_patches] = find_patch_rows(
    span,
    offsets[of_patches],
    kernel,
    None if sums is None else sums[of_patches],
    size,
    model.rates[patching.site],
    smooth_prior(places.astype(float)),
  )
  return rows


def _look(model, patching, params) -> tuple[np.ndarray, Path | None]:
  """Returns what dropout is given for a blank image, f64[tokens, width], and the layer behind."""
  seen: list[jax.Array] = []
  paths: list[Path] = []

  def on_site(call):
    if call.name == patching.site:
      seen.append(call.inputs)
    return call.inputs

  def on_linear(layer, inputs, outputs, nested):
    if seen and not nested and layer.convolution is None and inputs.shape == seen[0].shape:
      paths.append(layer.path)
    return outputs

  images = jnp.zeros((1, *model.image_shape))
  model.network.call(params, images, Hooks(on_site, on_linear))
  offsets = np.asarray(seen[0], np.float64)
  return offsets.reshape(-1, offsets.shape[-1]), paths[0] if paths else None


def _put_together(model, patching, rows, size, found, width) -> PatchBatch:
  """Puts patches together that go on smoothly at their borders."""
  numbers = np.arange(np.prod(model.image_shape)).reshape(model.image_shape)
  borders = _borders(numbers, patching.pixels)
  flat = [
    (t, row)
    for t, at in enumerate(rows[patching.first : patching.first + len(patching.pixels)])
    for row in at
  ]
  positions = np.array([t for t, _ in flat])
  affinity = np.zeros((len(flat), len(flat)))
  for i, (t, row) in enumerate(flat):
    for j, (other, neighbour) in enumerate(flat):
      if (t, other) in borders:
        mine, theirs = borders[t, other]
        apart = np.mean((row.patch[mine] - neighbour.patch[theirs]) ** 2)
        affinity[i, j] = affinity[j, i] = -apart
  images = np.full((size, numbers.size), np.nan)
  masks = np.full((size, len(rows), width), np.nan)
  start = _halves(affinity, positions) if size == 2 else None
  for i, sequence in enumerate(assign(affinity, positions, size, start)):
    t, row = flat[i]
    images[sequence, patching.pixels[t]] = row.patch
    masks[sequence, patching.first + t] = row.mask
  images = images.reshape(size, *model.image_shape)
  return PatchBatch(np.stack([_fill(image) for image in images]), masks, found)


def _halves(affinity: np.ndarray, positions: np.ndarray) -> np.ndarray:
  """Returns a first guess which of two images each patch is of: the best cut, by its relaxation."""
  count = int(positions.max()) + 1
  pairs = [np.flatnonzero(positions == t) for t in range(count)]
  coupling = np.zeros((count, count))
  for t in range(count):
    for other in range(count):
      if len(pairs[t]) == len(pairs[other]) == 2:
        block = affinity[np.ix_(pairs[t], pairs[other])]
        coupling[t, other] = np.trace(block) - block[0, 1] - block[1, 0]
  sign = np.linalg.eigh(coupling)[1][:, -1] > 0
  sequence = np.zeros(len(positions), int)
  for t, pair in enumerate(pairs):
    sequence[pair] = (np.arange(len(pair)) + sign[t]) % 2
  return sequence


def _match_labels(
  model: DropoutModel,
  patching: Patching,
  batch: PatchBatch,
  params: Params,
  gradient: Gradient,
  labels: Integer[np.ndarray, " batch"],
) -> PatchBatch:
  """Returns images in the order of labels.

  The column of a class in the gradient of the classifier's kernel is minus the features of its
  images, but for the probabilities; with expected masks these are known well enough.
  """
  layer = next((x for x in model.dense(len(labels)) if x.path == model.classifier), None)
  leaves = leaves_by_path(gradient)
  if layer is None or (labels < 0).any() or (*layer.path, "kernel") not in leaves:
    return batch
  masks = expected_masks(model, len(labels))
  assert patching.site is not None  # or no patches were found
  kept = masks[patching.site]
  read = batch.masks.reshape(kept.shape)
  masks[patching.site] = jnp.where(np.isnan(read), kept, np.nan_to_num(read))
  taps = {layer.path: tuple(jnp.zeros(shape) for shape in layer.shapes)}
  images = jnp.asarray(batch.images, jnp.float32)
  features = model.apply_tapped(params, masks, images, taps)[1][layer.path][0]
  kernel = np.asarray(leaves[*layer.path, "kernel"]).reshape(layer.inputs, -1)
  scores = np.asarray(features, np.float64) @ kernel[:, labels]
  order = linear_sum_assignment(scores.T)[1]
  return batch._replace(images=batch.images[order], masks=batch.masks[order])


def _borders(
  numbers: np.ndarray, pixels: np.ndarray
) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
  """Returns for patches that lie side by side which of their entries touch."""
  owner = np.zeros(numbers.size, int)
  place = np.zeros(numbers.size, int)
  for t, entries in enumerate(pixels):
    owner[entries], place[entries] = t, np.arange(len(entries))
  touching: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
  for first, second in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])):
    for a, b in zip(first.ravel(), second.ravel(), strict=True):
      if owner[a] != owner[b]:
        mine, theirs = touching.setdefault((owner[a], owner[b]), ([], []))
        mine.append(place[a])
        theirs.append(place[b])
  return {pair: (np.array(mine), np.array(theirs)) for pair, (mine, theirs) in touching.items()}


def _fill(image: np.ndarray) -> np.ndarray:
  """Fills pixels that are NaN with the mean of those around them."""
  image = image.copy()
  while np.isnan(image).any():
    around = np.pad(image, [(1, 1), (1, 1), (0, 0)], constant_values=np.nan)
    views = np.stack([around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]])
    known = ~np.isnan(views)
    mean = np.where(known, views, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    edge = np.isnan(image) & known.any(axis=0)
    if not edge.any():
      return np.nan_to_num(image)
    image[edge] = mean[edge]
  return image
