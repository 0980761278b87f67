"""What closed forms tell of several local steps: the images of a client's first step.

The first step is taken at the weights that the server sent, so the gradient of a sample in it is
what closed forms look for, and is found among those of all steps. Later steps are taken at weights
that moved; what is found of their images is approximate.
"""

import numpy as np

from jaxdia.client import LocalUpdate, Observation, mask_shapes
from jaxdia.closed_form.parts import Parts, Recovery, Verdict
from jaxdia.models import DropoutModel, batch_axes, expected_masks


def place_in_steps(model: DropoutModel, observation: Observation, found: Recovery) -> Recovery:
  """Returns what was found in the update of local steps, with each image in one of its steps.

  An exact image is one of a first step, and its masks are those of this step if there is but one
  epoch. Among the places that are free, one whose given label is the image's is taken first.
  Features are left out, as they are of one step only.

  Args:
    model: the network.
    observation: of one client, with local steps.
    found: by taking its update for the gradient of one batch.
  """
  local, size = observation.local, observation.batch_size
  assert local is not None  # or there is nothing to place
  parts, verdict = found.parts, np.asarray(found.parts.verdict)
  places = _places(local, size, observation.labels, parts)
  labels = np.array(parts.labels if observation.labels is None else observation.labels)
  known_labels = np.full(size, observation.labels is not None)
  of_image = {"images": np.zeros_like(parts.images), "verdict": np.zeros_like(verdict)}
  numbers = {"residual": np.full(size, np.nan), "error": np.full(size, np.nan)}
  each, dtype = local.images_a_step(size), np.asarray(parts.images).dtype
  shapes = mask_shapes(model, local, size)
  means = expected_masks(model, each, dtype)
  masks = {site: np.array(np.broadcast_to(means[site], shape)) for site, shape in shapes.items()}
  known = {site: np.zeros(shape, bool) for site, shape in shapes.items()}
  indices, axes = np.asarray(local.indices(size)), batch_axes(model)
  for i, place in places.items():
    for name, array in of_image.items():
      array[place] = np.asarray(getattr(parts, name))[i]
    for name, array in numbers.items():
      array[place] = np.broadcast_to(getattr(found, name), size)[i]
    if parts.known_labels[i]:
      labels[place], known_labels[place] = parts.labels[i], True
    if local.epochs > 1 or verdict[i] != Verdict.EXACT:
      continue
    step, row = np.argwhere(indices == place)[0]
    for site, axis in axes.items():
      if axis is None or parts.masks[site].shape[axis] != size:  # it is not one of an image alone
        continue
      for to, of in ((masks, parts.masks), (known, parts.known_masks)):
        np.moveaxis(to[site][step], axis, 0)[row] = np.moveaxis(np.asarray(of[site]), axis, 0)[i]
  reason = f"of {local.draws} local steps the first tells most; {found.reason}".rstrip("; ")
  return found._replace(
    parts=Parts(
      **of_image,
      masks=masks,
      known_masks=known,
      labels=labels,
      known_labels=known_labels,
      features={},
      known_features={},
    ),
    **numbers,
    reason=reason,
    determined=of_image["verdict"] == Verdict.EXACT,
  )


def _places(local: LocalUpdate, size: int, labels, parts: Parts) -> dict[int, int]:
  """Returns for each image that was found a place in the batch, the exact ones first."""
  verdict = np.asarray(parts.verdict)
  a_client = local.epochs * local.steps
  first = set(np.asarray(local.indices(size))[::a_client].ravel().tolist())
  free, places = list(range(size)), {}
  for i in sorted(np.flatnonzero(verdict).tolist(), key=lambda i: -verdict[i]):

    def is_unlikely(place, i=i):
      later = verdict[i] == Verdict.EXACT and place not in first
      if labels is None or not parts.known_labels[i]:
        return later, False
      return later, bool(labels[place] != parts.labels[i])

    places[i] = min(free, key=is_unlikely)
    free.remove(places[i])
  return places
