"""Vision transformers."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxdia.core.errors import InputError
from jaxdia.core.random import draw
from jaxdia.core.types import Images, Logits
from jaxdia.models.zoo.layers import dense


def _token_init(key, shape):
  # The same numbers where float64 is on.
  return draw(jax.random.normal, key, shape, dtype=jnp.float32)


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
    qkv = jnp.split(dense(y, 3 * width, "qkv", use_bias=False), 3, axis=-1)
    q, k, v = (part.reshape(batch, tokens, self.num_heads, -1) for part in qkv)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q[:, :num_outputs] * q.shape[-1] ** -0.5, k)
    # The derivatives of this softmax are sums of products. Those of nn.softmax divide, and cost
    # the attack, which differentiates twice, more.
    weights = dropout(jnp.exp(nn.log_softmax(scores)), "attention_dropout", axis=2)
    y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, num_outputs, width)
    x = x[:, :num_outputs] + dropout(dense(y, width, "projection"), "projection_dropout")

    y = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="mlp_norm")(x)
    y = nn.gelu(dense(y, self.mlp_size, "mlp_hidden"), approximate=False)
    y = dropout(y, "hidden_dropout")
    return x + dropout(dense(y, width, "mlp_output"), "output_dropout")


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

  def check(self, image_shape: tuple[int, int, int]) -> None:
    """Refuses images that cannot be cut into patches, and heads that do not share the width."""
    height, width, _ = image_shape
    if height % self.patch_size or width % self.patch_size:
      raise InputError(
        f"images of {height}x{width} pixels cannot be cut into patches of"
        f" {self.patch_size}x{self.patch_size}; choose a patch_size that divides both sides,"
        " or another image size."
      )
    if self.width % self.num_heads:
      raise InputError(
        f"num_heads is {self.num_heads}; expected a divisor of the width {self.width}."
      )

  @nn.compact
  def __call__(self, images: Images, train: bool = True) -> Logits:
    """Returns f[B, num_classes] logits of f[B, H, W, C] images; drops only if `train`."""
    batch, height, image_width, channels = images.shape
    size = self.patch_size
    x = images.reshape(batch, height // size, size, image_width // size, size, channels)
    x = jnp.swapaxes(x, 2, 3).reshape(batch, -1, size * size * channels)
    x = dense(x, self.width, "patch_embedding")
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
    return dense(x, self.num_classes, "classifier")


# The base-size ViT of Dosovitskiy et al. 2021.
_B16 = {"patch_size": 16, "width": 768, "depth": 12, "num_heads": 12, "mlp_size": 3072}
NETWORKS = {"vit": (ViT, {}), "vit_b16": (ViT, _B16)}
