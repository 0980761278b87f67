"""What the masks of a reconstruction are worth, compared with the client's."""

import numpy as np
from jaxtyping import Integer, Shaped

from jaxdia.client import LocalUpdate
from jaxdia.core.types import Array, Masks
from jaxdia.models import DropoutModel, batch_axes

# Entries of a searched mask between these are undecided.
UNDECIDED = (0.1, 0.9)


def mask_diagnostics(
  model: DropoutModel,
  masks: Masks,
  true: Masks,
  order: Integer[Array, " batch"],
  known: Masks | None = None,
  local: LocalUpdate | None = None,
) -> dict[str, dict[str, Shaped[np.ndarray, " batch"]]]:
  """Compares masks with the client's, by site.

  Args:
    model: whose sites they are.
    masks: of the reconstruction, in [0, 1].
    true: the client's.
    order: i[B], which reconstruction stands for which original.
    known: {site: b[shape]}, the entries that count; all if None.
    local: local steps, whose masks of an image are taken together; None for one step.

  Returns:
    {site: {name: f[B]}} with `accuracy`, the share of entries that are right once rounded; `auc`,
    the chance that a kept entry has a larger value than a dropped one; `undecided`, the share
    of entries from 0.1 to 0.9; `dropped`, the mean of 1 - mask, to be held against the rate; and
    `count`, the number of entries. NaN where no entry counts, and the AUC also where all were
    kept or all dropped. A site whose mask is shared by the batch gives the same numbers to all
    images, if all its entries count.
  """
  batch, axes = len(order), batch_axes(model)

  def by_image(site, mask):
    mask, axis = np.asarray(mask), axes[site]
    if mask.dtype not in (bool, np.float32, np.float64):  # as bfloat16, which scipy cannot rank
      mask = mask.astype(np.float32)
    if axis is None:
      return np.broadcast_to(mask.reshape(1, -1), (batch, mask.size))
    # Some networks fold another axis into that of the batch, as (batch * tokens).
    if local is None:
      return np.moveaxis(mask, axis, 0).reshape(batch, -1)
    taken = np.asarray(local.indices(batch))
    rows = np.moveaxis(mask, axis + 1, 1).reshape(taken.size, -1)
    return rows[np.argsort(taken.ravel(), kind="stable")].reshape(batch, -1)

  result = {}
  for site in true:
    found, right = by_image(site, masks[site]), by_image(site, true[site]) >= 0.5
    counts = np.ones(found.shape, bool) if known is None else by_image(site, known[site])
    if axes[site] is None:
      counts = np.full(counts.shape, bool(counts.all()))
    else:
      found, counts = found[order], counts[order]
    columns = [_compare(*rows) for rows in zip(found, right, counts, strict=True)]
    result[site] = {name: np.array([c[name] for c in columns]) for name in columns[0]}
  return result


def _compare(mask, true, counts) -> dict[str, float]:
  mask, true = mask[counts], true[counts]
  if not mask.size:
    return dict.fromkeys(("accuracy", "auc", "undecided", "dropped"), np.nan) | {"count": 0}
  kept = int(np.sum(true))
  pairs = kept * (true.size - kept)
  auc = np.nan
  if pairs:
    from scipy.stats import rankdata  # slow to import, and no command needs it to start

    auc = (np.sum(rankdata(mask)[true]) - kept * (kept + 1) / 2) / pairs
  return {
    "accuracy": float(np.mean((mask >= 0.5) == true)),
    "auc": float(auc),
    "undecided": float(np.mean((mask > UNDECIDED[0]) & (mask < UNDECIDED[1]))),
    "dropped": float(np.mean(1 - mask)),
    "count": mask.size,
  }
