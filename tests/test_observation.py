"""What does not fit together is refused where an observation is made, with the mend."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_victims
from flax import linen as nn
from flax.core import freeze
from flax.traverse_util import flatten_dict
from jax.flatten_util import ravel_pytree

from jaxdia import attacks, engine, gradients, models
from jaxdia.client import Observation, defences, observe
from jaxdia.closed_form import recover
from jaxdia.core.errors import InputError


@pytest.fixture
def seen(model):
  return make_victims(model, 1, batch_size=2)[1][0]


def _with(seen, **changes):
  return dataclasses.replace(seen, **changes)


def test_the_hash_of_what_holds_arrays_is_refused_by_its_own_name(model, seen):
  _, _, (secret,) = make_victims(model, 1, batch_size=2)
  for value in (seen, secret, gradients.prepare(model, seen)):
    with pytest.raises(TypeError, match=f"unhashable type: '{type(value).__name__}'"):
      hash(value)


class Tensor:
  """As one of PyTorch, whose types are not NumPy's."""

  def __init__(self, array):
    self.shape, self.dtype = array.shape, "torch.float32"

  def detach(self):
    return self


def _leaf(gradient, leaf):
  return gradient | {"hidden_0": {"kernel": leaf}}


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda g: {"params": g}, r"Pass gradient\['params'\]"),
    (lambda g: jax.tree.leaves(g), "put them there by jax.tree.unflatten"),
    (lambda g: _leaf(g, g["hidden_0"]["kernel"].T), r"shape \(24, 36\).*Transpose it"),
    (lambda g: _leaf(g, np.ones((36, 9), np.float32)), "may be of another network"),
    (lambda g: _leaf(g, 3), "'hidden_0/kernel' of the gradient is int"),
    (lambda g: _leaf(g, np.ones((36, 24), np.int32)), "is int32; expected floats"),
    (lambda g: g | {"hiden_0": g["hidden_0"]}, "'hiden_0/kernel', which the params lack"),
    (lambda g: jax.tree.map(lambda x: None, g), "has no leaf at all"),
    (lambda g: {"params": g, "batch_stats": {"mean": np.ones(3)}}, r"Pass gradient\['params'\]"),
    (lambda g: [g], "is a list of 1; expected a tree like the params, which has 3 leaves.$"),
    (flatten_dict, r"name .*'classifier', 'kernel'.*unflatten_dict\(gradient\)"),
    (lambda g: flatten_dict(g, sep="/"), r"name 'classifier/kernel'.*\(gradient, sep='/'\)"),
    (lambda g: flatten_dict({"params": g}, sep="."), r"'params.classifier.kernel'.*sep='.'"),
    (lambda g: ravel_pytree(g)[0], r"is one array; .*ravel_pytree\(params\)\[1\]\(gradient\)"),
    (lambda g: "gradient.npz", "gradient is of type str; expected a tree like the params"),
    (lambda g: jax.tree.map(lambda x: [x, x], g), "has the leaf .*kernel/0', which the params"),
    (lambda g: jax.tree.map(np.ndarray.tolist, jax.device_get(g)), "is made of floats; .* numpy"),
    (lambda g: jax.tree.map(lambda x: jnp.stack([x, x]), g), "single images take the mean over"),
    (lambda g: jax.tree.map(Tensor, g), r"is Tensor; .* Use tensor.detach\(\).cpu\(\).numpy\(\)"),
  ],
)
def test_gradients_that_do_not_fit_the_params(seen, change, message):
  with pytest.raises(InputError, match=message):
    _with(seen, gradient=change(seen.gradient))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"batch_size": 3}, "batch_size=3 images"),
    ({"batch_size": 0}, "batch_size of the observation is 0"),
    ({"labels": [1, 2, 3]}, r"expected integers of shape \(2,\)"),
    ({"labels": [0.5, 1.0]}, "labels are float64"),
    ({"std": (0.0,)}, "expected values above 0"),
    ({"mean": (0.5, 0.5)}, "2 means and 1 standard deviations"),
    ({"mean": [33.0], "std": [78.0]}, "Divide mean and std by 255"),
    ({"mean": [np.nan]}, "one finite number a channel"),
    ({"mean": None}, "mean is None; expected one finite number"),
  ],
)
def test_facts_that_do_not_fit_the_batch(seen, changes, message):
  with pytest.raises(InputError, match=message):
    _with(seen, **changes)


def test_gradients_by_name_in_other_containers_are_taken(seen):
  named = collections.namedtuple("Gradient", list(seen.gradient))
  for gradient in (
    named(**seen.gradient),
    freeze(seen.gradient),
    jax.tree.map(lambda x: nn.Partitioned(x, (None, "model")), seen.gradient),
  ):
    made = _with(seen, params=freeze(seen.params), gradient=gradient)
    for own, other in zip(*map(jax.tree.leaves, (made.gradient, seen.gradient)), strict=True):
      np.testing.assert_array_equal(own, other)


def test_params_in_boxes_are_taken_out_of_them(model, seen):
  boxed = jax.tree.map(lambda x: nn.Partitioned(x, (None, "model")), seen.params)
  images = np.full((2, 6, 6, 1), 0.5, np.float32)
  found = observe(jax.random.key(0), model, boxed, images, [1, 2])[0]
  plain = observe(jax.random.key(0), model, seen.params, images, [1, 2])[0]
  jax.tree.map(np.testing.assert_array_equal, found, plain)
  np.testing.assert_array_equal(
    model.apply(boxed, None, images), model.apply(seen.params, None, images)
  )


@pytest.mark.parametrize(
  "labels, mend",
  [
    ([[1], [2]], r"Use labels.ravel\(\)"),
    (np.eye(5)[:2], r"Use labels.argmax\(1\) if they are one-hot"),
    ([1.0, 2.0], r"Use labels.astype\(int\) if they are whole"),
    ([True, False], r"Use labels.astype\(int\)"),
    ({1, 2}, r"labels are object of shape \(\)"),
    (["1", "2"], "labels are <U1"),
  ],
)
def test_labels_of_other_forms_are_refused_with_the_mend(model, seen, labels, mend):
  images = np.full((2, 6, 6, 1), 0.5, np.float32)
  for call in (
    lambda: _with(seen, labels=labels),
    lambda: observe(jax.random.key(0), model, seen.params, images, labels),
  ):
    with pytest.raises(InputError, match=mend):
      call()


@pytest.mark.parametrize(
  "shape, mend",
  [
    ((2, 3, 6, 5), r"Use images.transpose\(0, 2, 3, 1\)"),
    ((6, 5, 3), r"Use images\[None\] for a single one"),
    ((2, 7, 5, 3), "Resize them, or create the model"),
    ((2, 6, 5), "Resize them"),
  ],
)
def test_images_of_other_shapes_are_refused_with_the_mend(shape, mend):
  model = models.create("mlp", (6, 5, 3), 5, hidden_sizes=(4,))
  params = model.init(jax.random.key(0))
  with pytest.raises(InputError, match=mend):
    observe(jax.random.key(0), model, params, np.full(shape, 0.5, np.float32), [1, 2])


def test_statistics_of_a_pair_and_of_other_channels(model, seen):
  images = np.full((2, 6, 6, 1), 0.5, np.float32)
  given = (jax.random.key(0), model, seen.params, images, [1, 2])
  assert observe(*given, statistics=(0.25, 0.5))[0].mean.tolist() == [0.25]
  for wrong in ("mnist", None, {"mean": 0.5, "std": 0.5}):
    with pytest.raises(InputError, match=r"expected a Statistics\(mean, std\)"):
      observe(*given, statistics=wrong)
  with pytest.raises(InputError, match="statistics are for 3 channels; .* each of the 1"):
    observe(*given, statistics=([0.5] * 3, [0.5] * 3))


def test_lists_and_half_precision_are_converted(seen):
  half = jax.tree.map(lambda x: np.asarray(x, np.float16), seen.gradient)
  made = Observation(seen.params, half, [1, 2], (0.5,), [0.25], np.int64(2))
  assert {leaf.dtype for leaf in jax.tree.leaves(made.gradient)} == {jnp.dtype("float32")}
  assert made.labels.dtype == jnp.int32 and made.mean.shape == (1,)
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), seen.params)
  with pytest.raises(InputError, match="the params are bfloat16.*astype"):
    _with(seen, params=low)


def test_frozen_layers_are_left_out_and_said():
  model = models.create("mlp", (6, 6, 1), 5, 0.25, hidden_sizes=(24, 24))
  _, (seen,), _ = make_victims(model, 1)
  frozen = _with(seen, gradient=seen.gradient | {"hidden_0": None})
  state = attacks.solve(jax.random.key(0), attacks.dia(model, max_iterations=3), frozen)
  assert np.isfinite(state.best.objective)
  recovery = recover(jax.random.key(0), model, frozen)
  assert not recovery.parts.verdict.any() and "hidden_0 is frozen" in recovery.reason


def test_a_gradient_of_the_opposite_sign_is_refused():
  model = models.create("mlp", (6, 6, 1), 9, 0.25, hidden_sizes=(24,), use_bias=True)
  _, observations, _ = make_victims(model, 3, batch_size=2)
  attack = attacks.dia(model, max_iterations=2)
  for seen in observations:
    turned = _with(seen, gradient=jax.tree.map(jnp.negative, seen.gradient))
    for refuse in (
      lambda t=turned: attacks.solve(jax.random.key(0), attack, t),
      lambda t=turned: list(engine.run(engine.Task(jax.random.key(0), attack, [t]))),
      lambda t=turned: recover(jax.random.key(0), model, t),
    ):
      with pytest.raises(InputError, match="opposite sign"):
        refuse()
    assert attacks.solve(jax.random.key(0), attack, seen).iteration == 2


def test_pixels_out_of_range_are_refused(model):
  params = model.init(jax.random.key(0))
  images = 255 * np.random.default_rng(0).uniform(size=(1, 6, 6, 1)).astype(np.float32)
  with pytest.raises(InputError, match="expected 0 to 1, which is all that an attack looks for"):
    observe(jax.random.key(0), model, params, images, np.array([1]))


def test_a_checkpoint_of_another_attack_or_client_is_refused(model, tmp_path):
  _, observations, _ = make_victims(model, 2)
  path = tmp_path / "checkpoint.npz"
  options = {"checkpoint_path": path, "checkpoint_seconds": 0.0, "chunk": 2, "lanes": 1}
  options["devices"] = jax.local_devices()[:1]

  def start(attack, observation, key=0):
    return engine.run(engine.Task(jax.random.key(key), attack, [observation]), **options)

  attack = attacks.dia(model, max_iterations=30)

  class Enough(Exception):
    pass

  def stop(progress):
    if path.exists():
      raise Enough

  with pytest.raises(Enough):
    list(
      engine.run(
        engine.Task(jax.random.key(0), attack, observations[:1]), on_progress=stop, **options
      )
    )
  for other in (
    (attacks.dia(model, max_iterations=30, learning_rate=0.2), observations[0]),
    (attack, observations[1]),
    (attack, observations[0], 1),
  ):
    with pytest.raises(InputError, match="is of another run"):
      list(start(*other))
  (trial,) = start(attack, observations[0])
  path.unlink(missing_ok=True)
  (alone,) = start(attack, observations[0])
  np.testing.assert_array_equal(trial.candidate.images, alone.candidate.images)


def test_defences_change_what_is_sent_and_nothing_else(model):
  params = model.init(jax.random.key(0))
  images, labels = np.full((1, 6, 6, 1), 0.5, np.float32), np.array([1])
  plain, secret = observe(jax.random.key(3), model, params, images, labels)
  noise = defences.create("gaussian_noise", std=1e-2)
  sent, same = observe(jax.random.key(3), model, params, images, labels, defence=noise)
  jax.tree.map(np.testing.assert_array_equal, secret, same)
  added = np.concatenate(
    [
      np.ravel(a - b)
      for a, b in zip(jax.tree.leaves(sent.gradient), jax.tree.leaves(plain.gradient), strict=True)
    ]
  )
  assert abs(added.std() / 1e-2 - 1) < 0.1 and abs(added.mean()) < 2e-3
  assert defences.create("none") == defences.identity and noise == defences.create(
    "gaussian_noise", std=0.01
  )
  for name, settings, message in (
    ("gausian_noise", {}, "Did you mean 'gaussian_noise'"),
    ("gaussian_noise", {"sigma": 1}, "setting of the defence gaussian_noise: 'sigma'"),
    ("gaussian_noise", {"std": -1}, "std of the noise is -1"),
  ):
    with pytest.raises(InputError, match=message):
      defences.create(name, **settings)
