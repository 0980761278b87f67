"""What a client descends is a fact of the observation, and all that computes it takes it there."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_victims

from jaxdia import attacks, engine, gradients, models
from jaxdia.attacks.objective import objective
from jaxdia.attacks.protocol import Candidate, Known
from jaxdia.client import CROSS_ENTROPY, Loss, client_gradient, observe
from jaxdia.closed_form import recover_labels
from jaxdia.core.errors import InputError
from jaxdia.engine.jobs import trial_key

CLASSES = 5


def cubic(logits, targets):
  """A loss that has no name."""
  return jnp.mean(jnp.abs(jax.nn.softmax(logits) - targets) ** 3)


LOSSES = {
  "cross_entropy": CROSS_ENTROPY,
  "summed": Loss(reduction="sum"),
  "smoothed": Loss(label_smoothing=0.2),
  "binary": Loss("binary_cross_entropy"),
  "binary_summed_smoothed": Loss("binary_cross_entropy", "sum", 0.1),
  "squared": Loss("mean_squared_error"),
  "squared_summed": Loss("mean_squared_error", "sum"),
  "own": Loss(cubic),
}


@pytest.fixture(params=LOSSES)
def loss(request):
  return LOSSES[request.param]


def _by_definition(loss, logits, labels):
  """The loss in NumPy, from the definitions, image by image and logit by logit."""
  logits = np.asarray(logits, np.float64)
  targets = np.full(logits.shape, loss.label_smoothing / CLASSES)
  for i, label in enumerate(labels):
    targets[i, label] += 1 - loss.label_smoothing
  softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  sigmoid = 1 / (1 + np.exp(-logits))
  terms = {
    "cross_entropy": -(targets * np.log(softmax)).sum(axis=1),
    "binary_cross_entropy": -targets * np.log(sigmoid) - (1 - targets) * np.log(1 - sigmoid),
    "mean_squared_error": (logits - targets) ** 2,
    cubic: np.abs(softmax - targets) ** 3,
  }[loss.kind]
  return terms.sum() if loss.reduction == "sum" else terms.mean()


def test_values_are_those_of_the_definitions(loss):
  logits = np.random.default_rng(0).normal(size=(4, CLASSES)).astype(np.float32)
  labels = np.array([0, 3, 3, 4])
  expected = _by_definition(loss, logits, labels)
  np.testing.assert_allclose(loss(logits, jnp.asarray(labels)), expected, rtol=1e-6)
  sure = jax.nn.one_hot(labels, CLASSES)
  np.testing.assert_allclose(loss(logits, sure), expected, rtol=1e-6)


def test_the_truth_matches_under_the_loss_of_the_observation_alone(model, loss):
  params, (seen,), (secret,) = make_victims(model, 1, batch_size=2, loss=loss)
  assert seen.loss == loss
  truth = (secret.masks, secret.images, secret.labels)
  expected = client_gradient(model, params, *truth, loss)
  for found, leaf in zip(jax.tree.leaves(seen.gradient), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(found, leaf, 1e-4, 1e-7)
  is_binary = loss.kind == "binary_cross_entropy"
  other = CROSS_ENTROPY if is_binary else Loss("binary_cross_entropy")
  compare = jax.jit(gradients.compare, static_argnums=6)
  for method in ("formed", "factored"):
    target = gradients.prepare(model, seen, method).target
    known, unlike = (compare(model, params, target, *truth, one) for one in (loss, other))
    assert gradients.cosine_distance(known) < 1e-5 < 1e-3 < gradients.cosine_distance(unlike)


def test_the_truth_has_no_objective(model, loss):
  _, (seen,), (secret,) = make_victims(model, 1, batch_size=2, loss=loss)
  settings = attacks.wiig(model).settings
  candidate, known = Candidate(secret.images, None, None), Known(secret.masks, secret.labels)
  for given in (seen, gradients.prepare(model, seen)):
    _, terms = objective(model, settings, given, candidate, known)
    assert terms.distance < 1e-5
    worse = candidate._replace(images=1 - secret.images)
    assert objective(model, settings, given, worse, known)[1].distance > 1e-3


def test_lanes_descend_the_loss_of_the_observation(model):
  """A function of one's own, in lanes and alone: the same trial."""
  _, observations, secrets = make_victims(model, 2, loss=cubic)
  attack = attacks.wiig(model, max_iterations=40)
  masks = [secret.masks for secret in secrets]
  task = engine.Task(jax.random.key(0), attack, observations, masks=masks)
  for trial in engine.run(task, devices=jax.local_devices()[:1]):
    number = trial.job.observation
    key = trial_key(task.key, trial.job)
    alone = attacks.solve(key, attack, observations[number], masks=masks[number]).best
    np.testing.assert_allclose(trial.distance, alone.distance, rtol=0.1)


def test_observations_of_several_losses_share_no_call(model):
  _, (first,), _ = make_victims(model, 1)
  second = dataclasses.replace(first, loss="mean_squared_error")
  task = engine.Task(jax.random.key(0), attacks.ig(model, max_iterations=1), [first, second])
  with pytest.raises(InputError, match="another batch size, loss or defence"):
    engine.run(task)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_label_of_an_image_is_read(loss, use_bias, scale):
  """At random weights, and at weights that make the network sure of what it says."""
  model = models.create("mlp", (6, 6, 1), CLASSES, 0.25, hidden_sizes=(24,), use_bias=use_bias)
  params = jax.tree.map(lambda x: scale * x, model.init(jax.random.key(0)))
  for label in range(CLASSES):
    images = np.random.default_rng(label).uniform(size=(1, 6, 6, 1)).astype(np.float32)
    key = jax.random.key(label)
    seen, _ = observe(key, model, params, images, [label], reveal_labels=False, loss=loss)
    if not use_bias and loss.kind in ("mean_squared_error", cubic):
      with pytest.raises(InputError, match=f"of the loss {loss.name} by classifier"):
        recover_labels(model, seen)
    else:
      surer_than_smoothed = scale > 1 and not use_bias and loss.label_smoothing
      assert recover_labels(model, seen).tolist() == [label] or surer_than_smoothed


@pytest.mark.parametrize("use_bias, least", [(True, 24), (False, 16)])
def test_the_labels_of_a_batch_are_counted(loss, use_bias, least):
  model = models.create("mlp", (6, 6, 1), CLASSES, 0.25, hidden_sizes=(24,), use_bias=use_bias)
  params = model.init(jax.random.key(0))
  right = 0
  for seed in range(6):
    rng = np.random.default_rng(seed)
    images, labels = rng.uniform(size=(4, 6, 6, 1)).astype(np.float32), rng.integers(0, CLASSES, 4)
    seen, _ = observe(jax.random.key(seed), model, params, images, labels, loss=loss)
    if loss.kind in ("mean_squared_error", cubic):
      with pytest.raises(InputError, match="that of a single image alone"):
        recover_labels(model, seen)
    else:
      found = collections.Counter(np.asarray(recover_labels(model, seen)).tolist())
      right += (found & collections.Counter(labels.tolist())).total()
  assert right >= least or loss.kind in ("mean_squared_error", cubic)


def test_losses_are_values_and_may_be_given_in_short(model):
  assert Loss("cross_entropy", label_smoothing=np.float32(0)) == CROSS_ENTROPY
  assert hash(Loss(cubic)) == hash(Loss(cubic)) and Loss(cubic).name == "cubic"
  _, (seen,), _ = make_victims(model, 1, loss=cubic)
  assert seen.loss == Loss(cubic)
  assert dataclasses.replace(seen, loss="binary_cross_entropy").loss.reduction == "mean"


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: Loss("cross_entorpy"), "Unknown kind of loss: 'cross_entorpy'. Did you mean"),
    (lambda: Loss(reduction="none"), "Unknown reduction of the loss: 'none'"),
    (lambda: Loss(label_smoothing=1), "label_smoothing is 1; expected a number in"),
    (lambda: Loss(label_smoothing=None), "label_smoothing is None"),
    (lambda: Loss(cubic, "sum"), "given to the loss cubic, a function of your own"),
    (lambda: Loss(lambda z, t: z)(jnp.ones((2, 3)), jnp.array([0, 1])), "Take its mean or sum"),
  ],
)
def test_losses_that_are_none(make, message):
  with pytest.raises(InputError, match=message):
    make()


def test_observations_refuse_what_is_no_loss(model):
  _, (seen,), _ = make_victims(model, 1)
  with pytest.raises(InputError, match="loss is 3; expected a Loss, one of cross_entropy"):
    dataclasses.replace(seen, loss=3)


@pytest.mark.parametrize(
  "function, message",
  [
    (lambda logits: 0.0, "ended in a TypeError: .*takes 1 positional.* function.logits, targets"),
    (lambda logits, targets: np.sum(np.asarray(logits)), "ended in a TracerArrayConversionError"),
    (lambda logits, targets: logits["a"], "the loss <lambda> ended in a "),
  ],
)
def test_a_function_that_fails_is_named(model, function, message):
  images, params = np.full((1, 6, 6, 1), 0.5, np.float32), model.init(jax.random.key(0))
  with pytest.raises(InputError, match=message):
    observe(jax.random.key(0), model, params, images, [1], loss=function)


@pytest.mark.parametrize("scale", [1e-5, 1e-6])
def test_a_search_converges_however_small_the_gradient(scale):
  """As that of trained weights may be; what is added to its norm must not keep it from 0."""

  def scaled(logits, targets):
    return scale * CROSS_ENTROPY(logits, targets)

  model = models.create("mlp", (6, 6, 1), CLASSES, 0.25, hidden_sizes=(24, 24), use_bias=True)
  _, (observation,), (secret,) = make_victims(model, 1, loss=scaled)
  norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(observation.gradient)))
  assert 0.1 * scale < norm < 10 * scale
  attack = attacks.wiig(model, tv_weight=0.0, learning_rate=0.02, max_iterations=1000)
  state = attacks.solve(jax.random.key(0), attack, observation, masks=secret.masks)
  assert int(state.status) == attacks.Status.CONVERGED, (state.best.objective, state.iteration)
  np.testing.assert_allclose(state.best.candidate.images, secret.images, atol=0.05)
