"""Language models: a post-norm encoder as BERT's, and a pre-norm causal one as GPT-2's."""

import jax
from flax import linen as nn
from jaxtyping import Float, Integer

from jaxdia.core.errors import InputError
from jaxdia.core.types import Array, Logits
from jaxdia.models.zoo.layers import dense


class _Block(nn.Module):
  """A transformer block with dropout of attention weights and of both residual branches.

  Attributes:
    num_heads: attention heads.
    mlp_size: hidden width of the MLP.
    dropout_rate: at all sites.
    pre_norm: whether branches are normalised, or their sums.
    causal: whether a token sees those before it alone.
  """

  num_heads: int
  mlp_size: int
  dropout_rate: float
  pre_norm: bool
  causal: bool

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    def attend(y):
      mask = nn.make_causal_mask(y[..., 0]) if self.causal else None
      attention = nn.MultiHeadDotProductAttention(
        self.num_heads,
        dropout_rate=self.dropout_rate,
        broadcast_dropout=False,
        deterministic=not train,
        name="attention",
      )
      return dropout(attention(y, mask=mask), "attention_dropout")

    def transform(y):
      y = nn.gelu(dense(y, self.mlp_size, "mlp_hidden"), approximate=False)
      return dropout(dense(y, x.shape[-1], "mlp_output"), "mlp_dropout")

    def dropout(y, name):
      return nn.Dropout(self.dropout_rate, name=name)(y, deterministic=not train)

    for branch, name in ((attend, "attention_norm"), (transform, "mlp_norm")):
      x = x + branch(_norm(x, name)) if self.pre_norm else _norm(x + branch(x), name)
    return x


class LanguageModel(nn.Module):
  """A transformer over tokens; with `num_classes` it says what kind of text they are.

  Attributes:
    vocabulary: number of tokens there are.
    dropout_rate: at all 1 + 3 * depth sites.
    num_classes: number of logits of a sequence; None predicts the next token at each position.
    causal: as GPT-2: pre-norm, a token sees those before it, and a class is told at the last
      one; otherwise as BERT: post-norm, all tokens see each other, a class is told at the first.
    tied: whether the next token's logits are products with the token embedding.
    width: of the tokens.
    depth: number of blocks.
    num_heads: attention heads.
    mlp_size: hidden width of the blocks' MLPs.
    most_tokens: of a sequence, the number of position embeddings.
  """

  vocabulary: int
  dropout_rate: float = 0.1
  num_classes: int | None = None
  causal: bool = True
  tied: bool = False
  width: int = 256
  depth: int = 2
  num_heads: int = 4
  mlp_size: int = 1024
  most_tokens: int = 512

  def __post_init__(self) -> None:
    if self.width % self.num_heads:
      raise InputError(
        f"num_heads is {self.num_heads}; expected a divisor of the width {self.width}."
      )
    super().__post_init__()

  @nn.compact
  def __call__(
    self, tokens: Integer[Array, "batch tokens"], train: bool = True
  ) -> Logits | Float[Array, "batch tokens vocabulary"]:
    """Returns logits of tokens i[B, T]; drops only if `train`.

    Returns:
      f[B, num_classes], or f[B, T, vocabulary] without classes.
    """
    normal = nn.initializers.normal(0.02)  # as both were
    table = nn.Embed(self.vocabulary, self.width, embedding_init=normal, name="token_embedding")
    positions = self.param("position_embedding", normal, (self.most_tokens, self.width))
    x = table(tokens) + positions[: tokens.shape[1]]
    if not self.causal:
      x = _norm(x, "embedding_norm")
    x = nn.Dropout(self.dropout_rate, name="embedding_dropout")(x, deterministic=not train)
    for i in range(self.depth):
      block = _Block(
        self.num_heads,
        self.mlp_size,
        self.dropout_rate,
        pre_norm=self.causal,
        causal=self.causal,
        name=f"block_{i}",
      )
      x = block(x, train)
    if self.causal:
      x = _norm(x, "norm")
    if self.num_classes is not None:
      return dense(x[:, -1 if self.causal else 0], self.num_classes, "classifier")
    return table.attend(x) if self.tied else dense(x, self.vocabulary, "head", use_bias=False)


def _norm(x: jax.Array, name: str) -> jax.Array:
  return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)(x)


LANGUAGE_MODELS = {"gpt": {"causal": True}, "bert": {"causal": False}}
