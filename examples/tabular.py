"""What the gradient of a client says of the rows of a table, behind dropout.

The rows are those of Fair's survey of 1978, which statsmodels ships: occupation of a person and of
the spouse, religiousness and rating of the marriage as categories, age, years and education as
numbers; the label is whether there was an affair. The network is an MLP with dropout. Scored is
how many rows were read exactly: all categories right, and all numbers to 1 % of their range.

  pip install -e ".[examples]"
  python examples/tabular.py --batch_size=16 --dropout_rate=0.5
"""

import jax
import numpy as np
from absl import app, flags
from flax import linen as nn
from scipy.optimize import linear_sum_assignment
from statsmodels.datasets import fair

from jaxdia import attacks, data, models
from jaxdia.client import observe

_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Rows of a client.")
_CLIENTS = flags.DEFINE_integer("clients", 4, "Clients that are attacked.")
_RATE = flags.DEFINE_float("dropout_rate", 0.5, "Of both dropout sites.")
_ATTACKS = flags.DEFINE_list("attacks", ["closed_form", "dia", "ig"], "Attacks, by name.")
_ITERATIONS = flags.DEFINE_integer("max_iterations", 2_000, "Of the searches.")

CATEGORIES = ("rate_marriage", "religious", "occupation", "occupation_husb")
NUMBERS = ("age", "yrs_married", "children", "educ")


class Net(nn.Module):
  """An MLP over the columns of a table."""

  @nn.compact
  def __call__(self, rows: jax.Array, train: bool = True) -> jax.Array:
    """Returns f[B, 2] logits of f[B, columns]."""
    for _ in range(2):
      rows = nn.gelu(nn.Dense(256, use_bias=False)(rows))
      rows = nn.Dropout(_RATE.value)(rows, deterministic=not train)
    return nn.Dense(2)(rows)


def load() -> tuple[np.ndarray, np.ndarray, list[int]]:
  """Returns columns f[N, C], labels i[N], and how many columns each category has."""
  table = fair.load_pandas().data.sample(frac=1, random_state=0)
  codes = [np.unique(table[name], return_inverse=True) for name in CATEGORIES]
  columns = [np.eye(len(values))[inverse] for values, inverse in codes]
  widths = [column.shape[1] for column in columns]
  numbers = table[list(NUMBERS)].to_numpy(float)
  labels = (table["affairs"].to_numpy() > 0).astype(int)
  return np.concatenate([*columns, numbers], axis=1), labels, widths


def exact(found: np.ndarray, truth: np.ndarray, widths: list[int], span: np.ndarray) -> np.ndarray:
  """Returns b[B, B]: whether a found row (first axis) is an original one."""
  same = np.ones((len(found), len(truth)), bool)
  start = 0
  for width in widths:
    part = slice(start, start + width)
    same &= found[:, None, part].argmax(axis=-1) == truth[None, :, part].argmax(axis=-1)
    start += width
  apart = np.abs(found[:, None, start:] - truth[None, :, start:]) / span[start:]
  return same & (apart <= 0.01).all(axis=-1)


def main(argv: list[str]) -> None:
  """Attacks the clients, and prints how many rows each attack read."""
  del argv
  values, labels, widths = load()
  rows, statistics = data.normalize_features(values)
  model = models.from_flax(Net(), (values.shape[1],))
  params = model.init(jax.random.key(0))
  size, span = _BATCH_SIZE.value, np.ptp(values, axis=0)
  for name in _ATTACKS.value:
    # Columns have no neighbours, so there is no total variation.
    options = {} if name == "closed_form" else {"max_iterations": _ITERATIONS.value}
    attack = attacks.create(name, model, tv_weight=0.0, **options)
    right = 0
    for client in range(_CLIENTS.value):
      mine = slice(client * size, (client + 1) * size)
      key = jax.random.key(client)
      observation, _ = observe(key, model, params, rows[mine], labels[mine], statistics=statistics)
      state = attacks.solve(key, attack, observation)
      found = data.denormalize_features(state.best.candidate.images, values)
      same = exact(found, values[mine], widths, span)
      right += int(same[linear_sum_assignment(~same)].sum())
    print(f"{name}: {right} of {size * _CLIENTS.value} rows exactly", flush=True)


if __name__ == "__main__":
  app.run(main)
