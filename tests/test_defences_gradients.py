"""What each defence does to a gradient, and what it refuses."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_victims

from jaxdia import models
from jaxdia.client import client_gradient, defences, observe
from jaxdia.client.defences import Chain, Defence, Step
from jaxdia.core.errors import InputError
from jaxdia.models import sample_masks

KEY = jax.random.key(5)


def _gradient(seed=0, size=200):
  """Entries of several sizes, in leaves of several shapes."""
  rng = np.random.default_rng(seed)
  shapes = {"bias": (size,), "kernel": (size, 30), "scale": ()}
  return {
    name: jnp.asarray(rng.standard_normal(shape) * 0.1, jnp.float32)
    for name, shape in shapes.items()
  }


def _flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _send(name, gradient, step=None, **settings):
  return defences.create(name, **settings)(KEY, gradient, step)


def _step(batch_size=3, rate=0.25, **options):
  model = models.create("mlp", (6, 6, 1), 5, rate, hidden_sizes=(24, 24), **options)
  rng = np.random.default_rng(1)
  images = jnp.asarray(rng.uniform(size=(batch_size, 6, 6, 1)), jnp.float32)
  labels = jnp.asarray(rng.integers(0, 5, batch_size), jnp.int32)
  masks = sample_masks(jax.random.key(2), model, batch_size)
  return Step(model, model.init(jax.random.key(0)), masks, images, labels)


def _gradient_of(step):
  return client_gradient(step.model, step.params, step.masks, step.images, step.labels)


def test_clipping_scales_what_is_longer_and_leaves_what_is_not():
  gradient = _gradient()
  norm = np.linalg.norm(_flat(gradient))
  clipped = _flat(_send("clipping", gradient, max_norm=norm / 3))
  np.testing.assert_allclose(clipped, _flat(gradient) / 3, rtol=1e-5)
  np.testing.assert_array_equal(
    _flat(_send("clipping", gradient, max_norm=1.01 * norm)), _flat(gradient)
  )


def test_relative_noise_is_in_units_of_the_rms_entry():
  gradient = _gradient()
  rms = math.sqrt(np.mean(_flat(gradient) ** 2))
  added = _flat(_send("gaussian_noise", gradient, std=0.5, relative=True)) - _flat(gradient)
  assert abs(added.std() / (0.5 * rms) - 1) < 0.05
  more = jax.tree.map(lambda g: 7 * g, gradient)
  noised = _flat(_send("gaussian_noise", more, std=0.5, relative=True)) - _flat(more)
  np.testing.assert_allclose(noised, 7 * added, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_top_k_keeps_the_largest_entries_of_all_leaves_together(share):
  gradient = _gradient()
  before, after = _flat(gradient), _flat(_send("top_k", gradient, share=share))
  kept = after != 0
  assert kept.sum() == round(share * before.size)
  np.testing.assert_array_equal(after[kept], before[kept])
  if share < 1:
    assert abs(before[kept]).min() > abs(before[~kept]).max()


def test_percentile_prunes_small_entries_clips_large_ones_and_spares_single_numbers():
  gradient = _gradient() | {"scale": jnp.float32(1e-6)}
  sent = _send("percentile", gradient, percentile=40.0, gamma=0.1)
  assert sent["scale"] == gradient["scale"]
  before, after = (_flat([tree["bias"], tree["kernel"]]) for tree in (gradient, sent))
  assert abs(np.mean(after == 0) - 0.4) < 1e-3
  assert abs(before[after == 0]).max() < abs(before[after != 0]).min()
  assert abs(after).max() == np.float32(0.1)
  inside = (after != 0) & (abs(before) < 0.1)
  np.testing.assert_array_equal(after[inside], before[inside])
  assert np.all(after[abs(before) > 0.1] == np.sign(before[abs(before) > 0.1]) * np.float32(0.1))
  everything = _send("percentile", gradient, percentile=0.0, gamma=1.0)
  np.testing.assert_array_equal(_flat(everything), _flat(gradient))


@pytest.mark.parametrize("bits", [8, 16])
def test_quantised_entries_are_few_integers_whose_mean_is_the_entry(bits):
  gradient = _gradient(size=20) | {"zero": jnp.zeros(4)}
  defence = defences.create("quantisation", bits=bits)
  sent = jax.vmap(lambda key: defence(key, gradient))(jax.random.split(KEY, 400))
  most = 2 ** (bits - 1) - 1
  for name, leaf in gradient.items():
    unit = float(abs(leaf).max()) / most
    integers = np.asarray(sent[name]) / (unit or 1)
    np.testing.assert_allclose(integers, np.round(integers), atol=1e-2)
    assert abs(integers).max() < most + 0.01
    assert abs(sent[name] - leaf[None]).max() <= unit * 1.01  # one of the two neighbours
    error = np.mean(sent[name], axis=0) - leaf
    assert abs(error).max() <= 5 * unit / 2 / math.sqrt(400)
  assert not np.asarray(sent["zero"]).any()


@pytest.mark.parametrize("dtype, bits", [("float16", 11), ("bfloat16", 8)])
def test_rounding_leaves_few_bits(dtype, bits):
  gradient = _gradient()
  sent = _send("rounding", gradient, dtype=dtype)
  assert {leaf.dtype for leaf in jax.tree.leaves(sent)} == {jnp.dtype("float32")}
  mantissas, _ = np.frexp(_flat(sent))
  np.testing.assert_array_equal(mantissas * 2**bits, np.round(mantissas * 2**bits))
  np.testing.assert_allclose(_flat(sent), _flat(gradient), rtol=2.0**-bits, atol=2.0**-25)


def test_soteria_prunes_the_rows_of_the_features_that_images_hang_on():
  """Of one image: by |r| / |dr/dx|, computed here from the Jacobian of the features."""
  step = _step(batch_size=1, rate=0.5)
  model, gradient = step.model, _gradient_of(step)
  sent = _send("soteria", gradient, step, pruned=0.25)

  def features(image):  # what goes into the classifier
    taps = {model.classifier: (jnp.zeros((1, 5)),)}
    return model.apply_tapped(step.params, step.masks, image, taps)[1][model.classifier][0][0]

  jacobian = jax.jacobian(features)(step.images).reshape(24, -1)
  r, slopes = np.asarray(features(step.images)), np.linalg.norm(jacobian, axis=1)
  importance = np.divide(abs(r), slopes, out=np.zeros(24), where=slopes > 0)
  before, after = (tree["classifier"]["kernel"] for tree in (gradient, sent))
  chosen = np.argsort(-importance)[:6]
  assert importance[chosen].min() > 0
  assert not np.asarray(after)[chosen].any()
  others = np.setdiff1d(np.arange(24), chosen)
  np.testing.assert_array_equal(np.asarray(after)[others], np.asarray(before)[others])
  assert np.asarray(before)[chosen].any(axis=1).all()
  for name in set(gradient) - {"classifier"}:
    jax.tree.map(np.testing.assert_array_equal, gradient[name], sent[name])


def test_dp_sgd_clips_the_gradient_of_each_image_under_its_own_masks():
  step = _step(batch_size=3, rate=0.5)
  gradient = _gradient_of(step)
  alone = []
  for i in range(3):
    masks = {site: mask[i : i + 1] for site, mask in step.masks.items()}
    own = (masks, step.images[i : i + 1], step.labels[i : i + 1])
    alone.append(_flat(client_gradient(step.model, step.params, *own)))
  norms = np.linalg.norm(alone, axis=1)
  bound = float(np.sort(norms)[1])  # two of them are longer, or as long
  assert norms.min() < 0.99 * bound < 1.01 * bound < norms.max()
  sent = _send("dp_sgd", gradient, step, max_norm=bound, noise_multiplier=0.0)
  factors = np.minimum(1, bound / norms)[:, None]
  np.testing.assert_allclose(_flat(sent), np.mean(alone * factors, axis=0), rtol=1e-4, atol=1e-6)
  # Long enough for all, the gradient is that of the batch; and so is the noise what it says.
  sent = _send("dp_sgd", gradient, step, max_norm=1e3, noise_multiplier=0.0)
  np.testing.assert_allclose(_flat(sent), _flat(gradient), rtol=1e-4, atol=1e-6)
  sent = _send("dp_sgd", gradient, step, max_norm=30.0, noise_multiplier=0.5)
  assert abs(np.std(_flat(sent) - _flat(gradient)) / (30 * 0.5 / 3) - 1) < 0.05


def test_adaptive_dropout_draws_masks_of_its_own_at_rates_of_its_own(model):
  step = _step(batch_size=1, rate=0.5)
  gradient = _gradient_of(step)
  # At rate 0 they are all ones, and the gradient is that of the network without dropout.
  none = _send("adaptive_dropout", gradient, step, lowest=0.0, highest=0.0, draws=3)
  plain = client_gradient(step.model, step.params, None, step.images, step.labels)
  np.testing.assert_allclose(_flat(none), _flat(plain), rtol=1e-4, atol=1e-6)

  def kept(draws, lowest, highest):  # share of hidden units with a gradient, of 100 steps
    defence = defences.create("adaptive_dropout", lowest=lowest, highest=highest, draws=draws)
    keys = jax.random.split(KEY, 100)
    sent = jax.vmap(lambda key: defence(key, gradient, step))(keys)
    return np.any(sent["classifier"]["kernel"] != 0, axis=2).mean(axis=1)

  one, two = kept(1, 0.5, 0.5), kept(2, 0.5, 0.5)
  # 24 units, kept with a probability of 1/2, or 3/4 in one of two draws.
  assert abs(one.mean() - 0.5) < 0.05 and abs(two.mean() - 0.75) < 0.05
  wide = kept(1, 0.1, 0.9)
  assert abs(wide.mean() - 0.5) < 0.1 and wide.std() > 1.5 * one.std()
  _, _, (secret,) = make_victims(model, 1, defence=defences.create("adaptive_dropout"))
  assert secret.masks is None


@pytest.mark.skipif(not importlib.util.find_spec("dp_accounting"), reason="needs dp-accounting")
def test_epsilon_is_that_of_the_gaussian_mechanism():
  """Of one step: by Balle and Wang (2018), theorem 8, δ of ε is known in closed form."""
  from scipy.stats import norm

  for sigma in (0.7, 1.0, 4.0):
    epsilon = defences.create("dp_sgd", noise_multiplier=sigma).epsilon(delta=1e-5)
    a, b = 1 / (2 * sigma), epsilon * sigma
    assert abs((norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b)) / 1e-5 - 1) < 0.01
  one = defences.create("dp_sgd")
  assert one.epsilon(sampling=0.1) < one.epsilon() < one.epsilon(steps=2)
  assert defences.create("dp_sgd", noise_multiplier=0.0).epsilon() == math.inf
  assert defences.create("dp_sgd,rounding").epsilon() == one.epsilon()


def test_a_chain_is_one_defence_after_the_other():
  gradient = _gradient()
  settings = {"share": 0.3, "max_norm": 0.5}
  sent = _send("top_k,clipping", gradient, **settings)
  pruned = _send("top_k", gradient, share=0.3)
  np.testing.assert_array_equal(_flat(sent), _flat(_send("clipping", pruned, max_norm=0.5)))
  made = defences.create("top_k, clipping", **settings)
  assert made == Chain(
    (defences.create("top_k", share=0.3), defences.create("clipping", max_norm=0.5))
  )
  assert defences.to_json(made) == {"name": "top_k,clipping", **settings}
  assert defences.create(**defences.to_json(made)) == made
  assert defences.describe(made) == "top_k(share=0.3), then clipping(max_norm=0.5)"


@pytest.mark.parametrize("name", [*defences.DEFENCES, "clipping,gaussian_noise"])
def test_a_defence_is_a_value_and_keeps_frozen_layers(name):
  one, other = defences.create(name), defences.create(name)
  assert one == other and hash(one) == hash(other)
  assert jax.tree.structure(one) == jax.tree.structure(other)
  assert all(isinstance(number, float) for number in jax.tree.leaves(one))
  step = _step()
  gradient = _gradient_of(step)
  gradient["classifier"] = {name: None for name in gradient["classifier"]}
  sent = one(KEY, gradient, step)
  shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (gradient, sent)]
  assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
  "name, settings, message",
  [
    ("clipping", {"max_norm": 0.0}, "max_norm of the clipping is 0.0; expected a finite number ab"),
    ("gaussian_noise", {"relative": 1}, "relative of the noise is 1; expected True or False"),
    ("top_k", {"share": 0.0}, "share of top_k is 0.0; expected a number above 0, at most 1"),
    ("top_k", {"share": 1.5}, "share of top_k is 1.5"),
    ("percentile", {"percentile": 101}, "percentile of the defence percentile is 101; expected"),
    ("percentile", {"gamma": 0}, "gamma of the defence percentile is 0; expected"),
    ("quantisation", {"bits": 4}, "bits of the quantisation is 4; expected 8 or 16"),
    ("rounding", {"dtype": "float8"}, "dtype of the rounding: 'float8'. Did you mean 'float16'"),
    ("soteria", {"pruned": 1.0}, r"pruned of soteria is 1.0; expected a number in \[0, 1\)"),
    ("adaptive_dropout", {"highest": 1.0}, "highest of adaptive_dropout is 1.0"),
    ("adaptive_dropout", {"lowest": 0.8, "highest": 0.2}, "a lowest rate that is not above the hi"),
    ("adaptive_dropout", {"draws": 0}, "draws of adaptive_dropout is 0; expected"),
    ("dp_sgd", {"max_norm": -1.0}, "max_norm of dp_sgd is -1.0; expected"),
    ("dp_sgd", {"noise_multiplier": -1.0}, "noise_multiplier of dp_sgd is -1.0; expected"),
    ("clipping,clipping", {}, "expected each of them once"),
    ("clipping,dp_sgd", {}, "DPSGD computes the gradient anew.* Make it the first"),
    ("dp_sgd,clipping", {"max_norm": 1.0}, "setting of dp_sgd and of clipping, which are both in"),
    ("clipping,top_k", {"std": 1.0}, "setting of the defence clipping,top_k: 'std'"),
    ("clipping,topk", {}, "defence 'topk'. Did you mean 'top_k'"),
  ],
)
def test_what_a_defence_cannot_be_is_refused(name, settings, message):
  with pytest.raises(InputError, match=message):
    defences.create(name, **settings)


def test_a_defence_without_its_step_or_its_layer_is_refused():
  for name in ("soteria", "dp_sgd", "adaptive_dropout"):
    with pytest.raises(InputError, match=f"the defence {name} needs the training step"):
      _send(name, _gradient())
  with pytest.raises(InputError, match="delta is 2"):
    defences.create("dp_sgd").epsilon(delta=2)


def test_what_is_no_defence_is_refused(model):
  class Plain(Defence):
    def __call__(self, key, gradient, step=None):
      return gradient

  for wrong, message in (
    (lambda key, gradient: gradient, "expected a jaxdia.client.defences.Defence"),
    (Plain(), "the defence Plain is no pytree. Decorate its class"),
  ):
    with pytest.raises(InputError, match=message):
      make_victims(model, 1, defence=wrong)


def test_the_server_knows_the_defence(model):
  params = model.init(jax.random.key(0))
  images, labels = np.full((1, 6, 6, 1), 0.5, np.float32), np.array([1])
  defence = defences.create("top_k", share=0.5)
  seen, _ = observe(jax.random.key(3), model, params, images, labels, defence=defence)
  assert seen.defence == defence
