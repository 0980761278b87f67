"""Victims that the tests of closed forms share."""

import functools

import jax

from jaxdia import attacks, data, evaluation, models
from jaxdia.client import observe

STATISTICS = data.STATISTICS["mnist"]


@functools.cache  # what is compiled for a network serves all tests, and all rates
def _make_network(name, shape, **options):
  return models.create(name, shape, 10, 0.5, **options)


def make_model(name="mlp", rate=0.5, shape=(28, 28, 1), **options):
  options = options or ({"hidden_sizes": (128, 96, 112)} if name == "mlp" else {})
  if rate == 0:
    return models.create(name, shape, 10, rate, **options)
  network = _make_network(name, shape, **options)
  return network.at_rates(dict.fromkeys(network.rates, rate))


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
