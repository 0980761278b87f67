"""What cannot be made a model is refused by name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jaxdia import models
from jaxdia.core.errors import InputError


class Noise(nn.Module):
  @nn.compact
  def __call__(self, x, train=True):
    x = nn.Dense(3)(x.reshape(len(x), -1))
    return x + jax.random.normal(self.make_rng("noise"), x.shape)


class NoiseFromDropoutKey(nn.Module):
  @nn.compact
  def __call__(self, x, train=True):
    x = nn.Dense(3)(x.reshape(len(x), -1))
    return x + jax.random.normal(self.make_rng("dropout"), x.shape)


class StepWithDropout(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return nn.Dropout(0.5, deterministic=False)(nn.Dense(4)(x)), None


class Scan(nn.Module):
  @nn.compact
  def __call__(self, x):
    layers = nn.scan(
      StepWithDropout,
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      length=3,
    )
    return layers()(x.reshape(len(x), -1), None)[0]


class Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dropout(0.5, deterministic=False)(nn.Dense(4)(x))


class Vmap(nn.Module):
  """Draws masks for each token under nn.vmap."""

  @nn.compact
  def __call__(self, x):
    block = nn.vmap(
      Block, in_axes=1, out_axes=1, variable_axes={"params": None},
      split_rngs={"params": False, "dropout": True},
    )  # fmt: skip
    return nn.Dense(3)(block()(x.reshape(len(x), 2, -1)).reshape(len(x), -1))


class NoParameters(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x.reshape(len(x), -1)


class Tempered(nn.Module):
  @nn.compact
  def __call__(self, x, temperature, train=True):
    return nn.Dense(3)(x.reshape(len(x), -1)) / temperature


class SpectrallyNormed(nn.Module):
  @nn.compact
  def __call__(self, x, train=True):
    return nn.SpectralNorm(nn.Dense(3))(x.reshape(len(x), -1), update_stats=train)


class OwnDropout(nn.Dropout):
  @nn.compact
  def __call__(self, inputs, deterministic=None, rng=None):
    return inputs * 2


class UsesOwnDropout(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(OwnDropout(0.5, name="mine")(x.reshape(len(x), -1), deterministic=False))


class CustomAttention(nn.Module):
  @nn.compact
  def __call__(self, x):
    def attend(query, key, value, **kwargs):
      return value

    x = x.reshape(len(x), 2, -1)
    layer = nn.MultiHeadDotProductAttention(
      2, dropout_rate=0.5, deterministic=False, attention_fn=attend, name="attend"
    )
    return nn.Dense(3)(layer(x).reshape(len(x), -1))


class Rate(nn.Module):
  rate: float

  @nn.compact
  def __call__(self, x):
    x = nn.Dropout(self.rate, deterministic=False, name="all")(x.reshape(len(x), -1))
    return nn.Dense(3)(x)


class OffByDefault(nn.Module):
  @nn.compact
  def __call__(self, x, is_learning=False):
    x = nn.Dropout(0.5, name="off")(x.reshape(len(x), -1), deterministic=not is_learning)
    return nn.Dense(3)(x)


class Undecided(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(nn.Dropout(0.5, name="undecided")(x.reshape(len(x), -1)))


class Wrapped(nn.Module):
  function: Callable[[jax.Array], jax.Array]

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(self.function(x))


FAILING = [
  (lambda x: np.asarray(x).reshape(len(x), -1), "Wrapped ended in a TracerArrayConversionError: "),
  (lambda x: x.reshape(len(x), 49), "ended in a TypeError: cannot reshape array of shape"),
  (lambda x: x.reshape(1, -1), "ended in a ScopeParamShapeError: .* any number of such images"),
  (lambda x: {}["oops"], "ended in a KeyError: 'oops' It was called with 1 and with 2 images of"),
]


@pytest.mark.parametrize("function, message", FAILING)
def test_modules_that_fail_are_named(function, message):
  with pytest.raises(InputError, match=message):
    models.from_flax(Wrapped(function), (2, 2, 1))
  if "ScopeParam" in message:
    return

  class Module(nnx.Module):
    def __init__(self):
      self.out = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
      return self.out(function(x))

  with pytest.raises(InputError, match=message.replace("Wrapped", "Module")):
    models.from_nnx(Module(), (2, 2, 1))


def test_logits_of_integers_are_refused():
  module = nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(3), lambda x: x.astype(int)])
  with pytest.raises(InputError, match="Sequential returns int32; expected logits of floats"):
    models.from_flax(module, (2, 2, 1))


@pytest.mark.parametrize(
  "module, message",
  [
    (Noise(), "Noise draws 6 random numbers for 2 images"),
    (NoiseFromDropoutKey(), r"draws 6 random numbers for 2 images, but .* \(none\) account for 0"),
    (Scan(), "nn.scan"),
    (Vmap(), "draws 16 random numbers for 2 images, but its dropout sites .* account for 8"),
    (NoParameters(), "has no parameters"),
    (Tempered(), "'temperature'. Pass call_kwargs"),
    (OffByDefault(), r"all dropout of OffByDefault \(off\) is switched off"),
    (SpectrallyNormed(), r"drawn at random, batch_stats/.*nn.SpectralNorm does"),
    (UsesOwnDropout(), "'mine' is a OwnDropout"),
    (CustomAttention(), "'attend' has a custom attention_fn"),
    (Rate(1.0), "'all' is 1.0; expected a number in"),
    (Rate(-0.5), "'all' is -0.5"),
    (Undecided(), "'undecided' is not told"),
    (nn.Dense(3), "expected one array of logits"),
    (nnx.Linear(2, 3, rngs=nnx.Rngs(0)), "expected an instance of flax.linen.Module"),
  ],
)
def test_from_flax_refuses_by_name(module, message):
  with pytest.raises(InputError, match=message):
    models.from_flax(module, (2, 2, 1))


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("mpl", (8, 8, 1), 10), "Unknown model 'mpl'. Did you mean 'mlp'"),
    (("mlp", (8, 8), 10), "image_shape is"),
    (("mlp", (8, 0, 1), 10), "image_shape is"),
    (("mlp", (8, 8, 1), 1), "num_classes is 1"),
    (("mlp", (8, 8, 1), 10, 1.0), "dropout_rate is 1.0"),
    (("mlp", (8, 8, 1), 10, -0.1), "dropout_rate is -0.1"),
    (("mlp", (8, 8, 1), 10, float("nan")), "dropout_rate is nan"),
    (("vit", (30, 30, 3), 10), "patches of 4x4"),
  ],
)
def test_create_refuses(arguments, message):
  with pytest.raises(InputError, match=message):
    models.create(*arguments)


@pytest.mark.parametrize(
  "name, options, message",
  [
    ("mlp", {"hiden_sizes": (3,)}, "'hiden_sizes'. Did you mean 'hidden_sizes'"),
    ("mlp", {"hidden_sizes": (0,)}, "hidden_sizes of the model mlp"),
    ("mlp", {"use_bias": 3}, "use_bias of the model mlp is 3"),
    ("vit", {"num_heads": 5}, "num_heads is 5"),
    ("resnet18", {"width": 6}, "width is 6"),
    ("convnet", {"width": 6}, "width is 6"),
    ("convnet", {"pool": "min"}, "pool of the model convnet"),
    ("convnet", {"activation": "rleu"}, "relu"),
  ],
)
def test_create_refuses_options(name, options, message):
  with pytest.raises(InputError, match=message):
    models.create(name, (8, 8, 3), 10, **options)


def test_masks_of_another_model_or_batch_are_refused(model):
  params, images = model.init(jax.random.key(0)), jnp.zeros((2, 6, 6, 1))
  with pytest.raises(InputError, match="masks have the sites"):
    model.apply(params, {}, images)
  with pytest.raises(InputError, match="'dropout_0' has shape"):
    model.apply(params, models.expected_masks(model, 3), images)
  # Annotations are checked in tests, so what apply does with it is called.
  none = {site.name: None for site in model.sites}
  with pytest.raises(InputError, match=r"mask of site 'dropout_.' is None; expected an array"):
    model._call(params, none, images, None)


def test_a_module_of_nnx_in_a_bridge_is_refused_with_the_mend():
  class Bridged(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
      x = nnx.bridge.to_linen(nnx.Linear, 16, 8, name="first")(x.reshape(len(x), -1))
      return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))

  with pytest.raises(InputError, match="first is a module of Flax NNX in a bridge.*from_nnx"):
    models.from_flax(Bridged(), (4, 4, 1))
