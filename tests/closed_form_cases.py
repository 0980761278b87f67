"""Victims that the tests of closed forms share."""

import jax

from jaxdia import attacks, data, evaluation, models
from jaxdia.client import observe

STATISTICS = data.STATISTICS["mnist"]


def make_model(name="mlp", rate=0.5, shape=(28, 28, 1), **options):
  options = options or ({"hidden_sizes": (128, 96, 112)} if name == "mlp" else {})
  return models.create(name, shape, 10, rate, **options)


def observe_victims(model, size, seed=0, dataset="mnist", **options):
  victims = data.load(f"samples:{dataset}", size, seed, image_size=model.image_shape[0])
  images = data.normalize(victims.images, victims.statistics)
  params = model.init(jax.random.key(seed))
  observation, secret = observe(
    jax.random.key(seed + 50),
    model,
    params,
    images,
    victims.labels,
    statistics=victims.statistics,
    reveal_labels=False,
    **options,
  )
  return observation, secret


def compute_scores(model, secret, recovery):
  candidate = attacks.Candidate(recovery.parts.images, recovery.parts.masks, None)
  return evaluation.evaluate(
    model,
    secret,
    candidate,
    STATISTICS,
    recovery.parts.labels,
    found=recovery.parts.verdict > 0,
    known_masks=recovery.parts.known_masks,
  ).scores


def make_lenet(**options):
  return make_model("lenet", shape=(16, 16, 1), hidden_size=128, **options)
