"""The built-in networks: ordinary Flax Linen modules with ordinary dropout."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

# PyTorch's default for linear and convolutional layers, which the paper's models are drawn
# with: uniform in +-1/sqrt(fan_in), kernel and bias.
_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _token_init(key, shape):
  return jax.random.normal(key, shape, jnp.float32)  # the same numbers where float64 is on


def _bias_init(fan_in: int) -> nn.initializers.Initializer:
  bound = fan_in**-0.5

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def _dense(x: jax.Array, features: int, name: str, use_bias: bool = True) -> jax.Array:
  layer = nn.Dense(
    features, use_bias, kernel_init=_kernel_init, bias_init=_bias_init(x.shape[-1]), name=name
  )
  return layer(x)


def _conv(
  x: jax.Array, features: int, size: int, stride: int, name: str, use_bias: bool = True
) -> jax.Array:
  layer = nn.Conv(
    features,
    (size, size),
    stride,
    padding=size // 2,
    use_bias=use_bias,
    kernel_init=_kernel_init,
    bias_init=_bias_init(size * size * x.shape[-1]),
    name=name,
  )
  return layer(x)


class MLP(nn.Module):
  """The paper's MLP: dense layers with GELU and dropout, and a dense classifier.

  Attributes:
    num_classes: number of logits.
    dropout_rate: after each hidden layer.
    hidden_sizes: width of each hidden layer.
    use_bias: in all layers.
  """

  num_classes: int
  dropout_rate: float = 0.25
  hidden_sizes: Sequence[int] = (512, 512, 512)
  use_bias: bool = False

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = True) -> jax.Array:
    """Returns f[B, num_classes] logits of f[B, H, W, C] images; drops only if `train`."""
    x = images.reshape(images.shape[0], -1)
    for i, size in enumerate(self.hidden_sizes):
      x = _dense(x, size, f"hidden_{i}", self.use_bias)
      x = nn.gelu(x, approximate=False)
      x = nn.Dropout(self.dropout_rate, name=f"dropout_{i}")(x, deterministic=not train)
    return _dense(x, self.num_classes, "classifier", self.use_bias)


class LeNet(nn.Module):
  """A LeNet in the manner of Zhu et al. 2019, with GELU, a hidden layer and dropout.

  Three 5x5 convolutions of strides 2, 2, 1, each followed by dropout, then a
  hidden dense layer with dropout before the classifier. The activation is
  smooth because the attacks differentiate the gradient.

  Attributes:
    num_classes: number of logits.
    dropout_rate: after each convolution and before the classifier.
    channels: of each convolution.
    hidden_size: width of the hidden dense layer.
  """

  num_classes: int
  dropout_rate: float = 0.25
  channels: int = 12
  hidden_size: int = 256

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = True) -> jax.Array:
    """Returns f[B, num_classes] logits of f[B, H, W, C] images; drops only if `train`."""
    x = images
    for i, stride in enumerate((2, 2, 1)):
      x = nn.gelu(_conv(x, self.channels, 5, stride, f"conv_{i}"), approximate=False)
      x = nn.Dropout(self.dropout_rate, name=f"dropout_{i}")(x, deterministic=not train)
    x = _dense(x.reshape(x.shape[0], -1), self.hidden_size, "hidden")
    x = nn.gelu(x, approximate=False)
    x = nn.Dropout(self.dropout_rate, name="dropout_3")(x, deterministic=not train)
    return _dense(x, self.num_classes, "classifier")


class ResNet18(nn.Module):
  """ResNet-18 (He et al. 2016) with group normalisation and dropout at the end.

  Images of up to 64 pixels get the 3x3 stem that is usual for CIFAR, larger ones
  the 7x7 stem with pooling.

  Attributes:
    num_classes: number of logits.
    dropout_rate: before the classifier.
    width: channels of the first stage; doubled in each of the three others.
    groups: of each group normalisation.
  """

  num_classes: int
  dropout_rate: float = 0.25
  width: int = 64
  groups: int = 32

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = True) -> jax.Array:
    """Returns f[B, num_classes] logits of f[B, H, W, C] images; drops only if `train`."""

    def norm(x, name):
      return nn.GroupNorm(self.groups, epsilon=1e-5, use_fast_variance=False, name=name)(x)

    if max(images.shape[1:3]) <= 64:
      x = nn.relu(norm(_conv(images, self.width, 3, 1, "stem", False), "stem_norm"))
    else:
      x = nn.relu(norm(_conv(images, self.width, 7, 2, "stem", False), "stem_norm"))
      x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    for stage in range(4):
      for block in range(2):
        features = self.width * 2**stage
        stride = 2 if stage > 0 and block == 0 else 1
        name = f"stage_{stage}_block_{block}"
        y = nn.relu(norm(_conv(x, features, 3, stride, f"{name}_conv_0", False), f"{name}_norm_0"))
        y = norm(_conv(y, features, 3, 1, f"{name}_conv_1", False), f"{name}_norm_1")
        if x.shape != y.shape:
          x = norm(_conv(x, features, 1, stride, f"{name}_skip", False), f"{name}_skip_norm")
        x = nn.relu(x + y)
    x = jnp.mean(x, axis=(1, 2))
    x = nn.Dropout(self.dropout_rate, name="dropout")(x, deterministic=not train)
    return _dense(x, self.num_classes, "classifier")


class _TransformerBlock(nn.Module):
  """A pre-norm transformer block with the paper's four dropout sites.

  Attributes:
    num_heads: attention heads.
    mlp_size: hidden width of the MLP.
    dropout_rate: at all sites.
    num_outputs: computes the first so many tokens only, or all. The sites keep
      an entry for every token: those of the others have no effect, whether they
      are computed or not.
  """

  num_heads: int
  mlp_size: int
  dropout_rate: float
  num_outputs: int | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    batch, tokens, width = x.shape
    num_outputs = tokens if self.num_outputs is None else self.num_outputs

    def dropout(x, name, axis=1):
      padding = [(0, tokens - num_outputs) if i == axis else (0, 0) for i in range(x.ndim)]
      x = nn.Dropout(self.dropout_rate, name=name)(jnp.pad(x, padding), deterministic=not train)
      return jax.lax.slice_in_dim(x, 0, num_outputs, axis=axis)

    y = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="attention_norm")(x)
    qkv = jnp.split(_dense(y, 3 * width, "qkv", use_bias=False), 3, axis=-1)
    q, k, v = (part.reshape(batch, tokens, self.num_heads, -1) for part in qkv)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q[:, :num_outputs] * q.shape[-1] ** -0.5, k)
    # The derivatives of this softmax are sums of products. Those of nn.softmax divide, and cost
    # the attack, which differentiates twice, more.
    weights = dropout(jnp.exp(nn.log_softmax(scores)), "attention_dropout", axis=2)
    y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, num_outputs, width)
    x = x[:, :num_outputs] + dropout(_dense(y, width, "projection"), "projection_dropout")

    y = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="mlp_norm")(x)
    y = nn.gelu(_dense(y, self.mlp_size, "mlp_hidden"), approximate=False)
    y = dropout(y, "hidden_dropout")
    return x + dropout(_dense(y, width, "mlp_output"), "output_dropout")


class ViT(nn.Module):
  """The paper's vision transformer: pre-norm, with class-token pooling.

  The class token and the position embedding are drawn N(0, 1), and the
  projection to queries, keys and values has no bias.

  Attributes:
    num_classes: number of logits.
    dropout_rate: at all 1 + 4 * depth sites.
    patch_size: side of the square patches, in pixels.
    width: of the tokens.
    depth: number of blocks.
    num_heads: attention heads.
    mlp_size: hidden width of the blocks' MLPs.
  """

  num_classes: int
  dropout_rate: float = 0.25
  patch_size: int = 4
  width: int = 256
  depth: int = 4
  num_heads: int = 16
  mlp_size: int = 256

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = True) -> jax.Array:
    """Returns f[B, num_classes] logits of f[B, H, W, C] images; drops only if `train`."""
    batch, height, image_width, channels = images.shape
    size = self.patch_size
    x = images.reshape(batch, height // size, size, image_width // size, size, channels)
    x = jnp.swapaxes(x, 2, 3).reshape(batch, -1, size * size * channels)
    x = _dense(x, self.width, "patch_embedding")
    class_token = self.param("class_token", _token_init, (1, 1, self.width))
    x = jnp.concatenate([jnp.tile(class_token, (batch, 1, 1)), x], axis=1)
    x = x + self.param("position_embedding", _token_init, (1, *x.shape[1:]))
    x = nn.Dropout(self.dropout_rate, name="embedding_dropout")(x, deterministic=not train)
    for i in range(self.depth):
      num_outputs = 1 if i == self.depth - 1 else None  # the class token alone is pooled
      block = _TransformerBlock(
        self.num_heads, self.mlp_size, self.dropout_rate, num_outputs, name=f"block_{i}"
      )
      x = block(x, train)
    x = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="norm")(x[:, 0])
    return _dense(x, self.num_classes, "classifier")
