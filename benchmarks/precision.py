"""What matrix products of bfloat16 would cost the reconstruction.

python benchmarks/precision.py --rates=0.5 --count=4 --max_iterations=3000

Clients train the paper's MLP on MNIST in float32. DIA attacks it with the same
network, once as it is and once with the operands of every product, and what flows
back through it, rounded to bfloat16: what a GPU or TPU does at its default
precision. Errors are mean squared errors in normalised space.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import linen as nn
from measuring import Table

from jaxdia import attacks, data, engine, models
from jaxdia.client import observe
from jaxdia.command_line import launch

_RATES = flags.DEFINE_list("rates", ["0.25", "0.5"], "Dropout rates.")
_COUNT = flags.DEFINE_integer("count", 16, "Number of images, at most 20.")
_MAX_ITERATIONS = flags.DEFINE_integer("max_iterations", 20_000, "Of each trial.")
_OUT = flags.DEFINE_string("out", None, "JSON file for the rows.")

_COLUMNS = {
  "dropout": "", "products": "", "median MSE": ".1e", "worst MSE": ".1e", "iterations": ".0f",
}  # fmt: skip


class MLP(nn.Module):
  """The paper's MLP, with products of its own."""

  rate: float
  rounded: bool

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
    """Returns the logits of images."""
    product = _rounded_product if self.rounded else None
    x = x.reshape(x.shape[0], -1)
    for i in range(3):
      x = nn.Dense(512, use_bias=False, dot_general=product, name=f"hidden_{i}")(x)
      x = nn.gelu(x, approximate=False)
      x = nn.Dropout(self.rate, name=f"dropout_{i}")(x, deterministic=not train)
    return nn.Dense(10, use_bias=False, dot_general=product, name="classifier")(x)


def _rounded_product(a, b, dimension_numbers, **kwargs):
  # Derivatives pass the conversions too, and are rounded by them.
  a, b = (x.astype(jnp.bfloat16).astype(x.dtype) for x in (a, b))
  return jax.lax.dot_general(a, b, dimension_numbers, **kwargs)


def main() -> None:
  """Attacks at each rate with both kinds of products."""
  victims = data.load("samples:mnist", _COUNT.value)
  images = data.normalize(victims.images, victims.statistics)
  table = Table({"victims": _COUNT.value}, _COLUMNS)
  for rate in map(float, _RATES.value):
    exact, rounded = (models.from_flax(MLP(rate, r), images.shape[1:]) for r in (False, True))
    params = jax.jit(
      models.create("mlp", images.shape[1:], victims.num_classes, rate).init
    )(jax.random.key(0))  # fmt: skip
    pairs = [
      observe(
        jax.random.key(i),
        exact,
        params,
        images[i : i + 1],
        victims.labels[i : i + 1],
        statistics=victims.statistics,
      )
      for i in range(len(images))
    ]
    observations, secrets = zip(*pairs, strict=True)
    for products, model in (("float32", exact), ("bfloat16", rounded)):
      attack = attacks.dia(model, max_iterations=_MAX_ITERATIONS.value)
      trials = list(engine.run([engine.Task(jax.random.key(1), attack, observations)]))
      errors = [
        float(np.mean(np.square(t.candidate.images - secrets[t.job.observation].images)))
        for t in trials
      ]
      table.add(
        dropout=rate,
        products=products,
        iterations=float(np.mean([t.iterations for t in trials])),
        **{"median MSE": float(np.median(errors)), "worst MSE": max(errors)},
      )
  table.write(_OUT.value)


if __name__ == "__main__":
  launch(main)
