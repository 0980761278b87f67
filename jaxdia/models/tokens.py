"""Makes the dropout of a language model explicit, and its token embeddings an input.

An attack searches real numbers, and tokens are none. So the network begins behind its token
embedding: its "images" are embeddings, f[B, T, 1, width], a row for each token. They are
standardised by the columns of the embedding's table, so that random numbers N(0, 1) are a start
like others, and the smallest box that holds the table is the box of valid pixels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float, Integer

from jaxdia.core.errors import InputError, check_count, unknown
from jaxdia.core.trees import Constants, Path, leaves_by_path, value_tree
from jaxdia.core.types import Array, Images, Key, Logits, Masks, Params, Statistics
from jaxdia.models.base import DropoutModel, check_rate, model_of
from jaxdia.models.create import check_options
from jaxdia.models.flax import FlaxNetwork, training_kwargs
from jaxdia.models.flax_interception import interceptor
from jaxdia.models.flax_variables import fit_collections
from jaxdia.models.hooks import Hooks, ignore_sites
from jaxdia.models.zoo.language import LANGUAGE_MODELS, LanguageModel

Tokens = Integer[Array, "batch tokens"]


class Attention(NamedTuple):
  """The attention that the tokens meet first.

  Attributes:
    query: path of the dense layer that makes queries.
    key: path of the one that makes keys.
    num_heads: attention heads.
    causal: whether a token sees those before it alone.
  """

  query: Path
  key: Path
  num_heads: int
  causal: bool


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TokenNetwork(FlaxNetwork):
  """A Flax Linen module over tokens, as a network over their embeddings.

  Attributes:
    table: path of the token embedding.
    vocabulary: number of its rows.
    attention: that the tokens meet first; None if it is none of Flax's.
    predicts_tokens: whether there are logits for each position.
  """

  table: Path
  vocabulary: int
  attention: Attention | None
  predicts_tokens: bool

  __hash__ = FlaxNetwork.__hash__

  def _example(self):
    return jnp.zeros((1, self.image_shape[0]), jnp.int32)

  def call_tokens(self, params: Params, tokens: Tokens, hooks: Hooks) -> Logits:
    """Computes logits of tokens as the client does.

    Args:
      params: as `init` gives them.
      tokens: i[B, T].
      hooks: at dropout and linear layers.
    """
    logits: Any = super()._step(params, tokens, hooks, self.collections.tree, None)[0]
    return logits.reshape(len(tokens), -1)

  def _step(self, params, images, hooks, others, rngs):
    embeddings = self.embeddings(params, images)
    pending = [embeddings]

    def substitute(next_fun, args, kwargs, context):
      path = (*context.module.path, "embedding")
      if context.method_name == "__call__" and path == self.table and pending:
        return pending.pop()
      return next_fun(*args, **kwargs)

    tokens = jnp.zeros(images.shape[:2], jnp.int32)
    with nn.intercept_methods(substitute):
      step: Any = super()._step(params, tokens, hooks, others, rngs)
    return step[0].reshape(len(images), -1), step[1]

  def embeddings(self, params: Params, images: Images) -> Float[Array, "batch height channels"]:
    """Returns embeddings in the units of the table."""
    mean, std, _ = self.columns(params)
    return images[:, :, 0] * std + mean

  def columns(
    self, params: Params
  ) -> tuple[Float[Array, " width"], Float[Array, " width"], Float[Array, "vocabulary width"]]:
    """Returns means and standard deviations of the columns of the table, and the table."""
    table = jax.lax.stop_gradient(leaves_by_path(params)[self.table])
    std = jnp.std(table, axis=0)
    return jnp.mean(table, axis=0), jnp.where(std > 0, std, 1), table


@value_tree
class TokenModel:
  """A language model whose dropout masks are an explicit argument.

  Attributes:
    model: over standardised embeddings, for attacks that search them. Logits of all positions
      are flat: f[B, T * vocabulary] if it predicts tokens.
  """

  model: DropoutModel

  @property
  def network(self) -> TokenNetwork:
    """The module as a network."""
    network = self.model.network
    assert isinstance(network, TokenNetwork)
    return network

  @property
  def length(self) -> int:
    """Tokens of a sequence, T."""
    return self.model.image_shape[0]

  def init(self, key: Key) -> Params:
    """Draws parameters."""
    return self.model.init(key)

  def apply(self, params: Params, masks: Masks | None, tokens: Tokens) -> Logits:
    """Computes flat logits of tokens under given masks; None is the evaluation mode.

    Args:
      params: as `init` gives them.
      masks: {site: f[shape]}.
      tokens: i[B, T].
    """
    return self.model._call(params, masks, tokens, None, self.network.call_tokens)

  def embed(self, params: Params, tokens: Tokens) -> Images:
    """Returns standardised embeddings of tokens, f[B, T, 1, width].

    Args:
      params: as `init` gives them.
      tokens: i[B, T].
    """
    mean, std, table = self.network.columns(params)
    return ((table[tokens] - mean) / std)[:, :, None]

  def nearest(self, params: Params, images: Images) -> Tokens:
    """Returns the tokens whose embeddings are nearest, i[B, T].

    Args:
      params: as `init` gives them.
      images: standardised embeddings.
    """
    mean, std, table = self.network.columns(params)
    rows, x = (table - mean) / std, images[:, :, 0]
    return jnp.argmax(x @ rows.T - 0.5 * jnp.sum(rows**2, axis=1), axis=-1)

  def statistics(self, params: Params) -> Statistics:
    """Returns the box that holds the table, as the statistics of pixels.

    Args:
      params: as `init` gives them.
    """
    mean, std, table = (np.asarray(x, np.float64) for x in self.network.columns(params))
    return Statistics.of_box(mean, std, table.min(axis=0), table.max(axis=0))


def from_flax_tokens(
  module: nn.Module,
  length: int,
  *,
  variables: Mapping[str, Any] | None = None,
  call_kwargs: Mapping[str, Any] | None = None,
) -> TokenModel:
  """Turns a Flax Linen language model into a `TokenModel`.

  Args:
    module: unbound; called as `module(tokens, **call_kwargs)` with i[B, T] tokens, that it looks
      up in an `nn.Embed`, it returns f[B, num_classes] or, of each position, f[B, T, vocabulary].
    length: tokens of a sequence, T.
    variables: see `jaxdia.models.from_flax`.
    call_kwargs: see `jaxdia.models.from_flax`.

  Raises:
    InputError: it looks up its tokens in no `nn.Embed`, or returns something else.
  """
  length = check_count("length of a sequence", length, 2)
  kwargs = training_kwargs(module) if call_kwargs is None else dict(call_kwargs)
  seen = _look(module, kwargs, length)
  network = TokenNetwork(
    module,
    (length, 1, seen.width),
    kwargs,
    Constants({}),
    table=seen.table,
    vocabulary=seen.vocabulary,
    attention=seen.attention,
    predicts_tokens=seen.predicts_tokens,
  )
  network = dataclasses.replace(network, collections=fit_collections(network, variables))
  return TokenModel(model_of(network))


def create_language_model(
  name: str,
  vocabulary: int,
  length: int,
  *,
  num_classes: int | None = None,
  dropout_rate: float = 0.1,
  **options: Any,
) -> TokenModel:
  """Creates one of the built-in language models.

  Args:
    name: "gpt" or "bert"; see `jaxdia.models.zoo.language.LanguageModel`.
    vocabulary: number of tokens there are.
    length: tokens of a sequence.
    num_classes: logits of a sequence; None predicts the next token at each position.
    dropout_rate: of all sites.
    **options: other attributes of `LanguageModel`.

  Raises:
    InputError: unknown name or option, or a value that the model cannot take.
  """
  if name not in LANGUAGE_MODELS:
    raise unknown("language model", name, LANGUAGE_MODELS)
  options = check_options(name, LanguageModel, options)
  rate = check_rate(dropout_rate)
  options = LANGUAGE_MODELS[name] | {"most_tokens": max(length, 2)} | options
  # Of all rates above 0 the network is the same.
  module = LanguageModel(vocabulary, 0.5 if rate else 0.0, num_classes, **options)
  model = from_flax_tokens(module, length)
  rates = dict.fromkeys(model.model.rates, rate)
  return TokenModel(dataclasses.replace(model.model, rates=rates))


class _Look(NamedTuple):
  """What calls of a module with tokens showed."""

  table: Path
  vocabulary: int
  width: int
  attention: Attention | None
  predicts_tokens: bool


def _look(module: nn.Module, kwargs: Mapping[str, Any], length: int) -> _Look:
  """Calls a module with two sequences that differ in the last token."""
  first = np.zeros((1, length), np.int32)
  other = first.copy()
  other[0, -1] = 1
  embeds: list[dict[Path, tuple[nn.Embed, Any]]] = []
  attentions: list[dict[Path, tuple[nn.MultiHeadDotProductAttention, Any]]] = []

  def watch(next_fun, args, kwargs, context):
    module, outputs = context.module, next_fun(*args, **kwargs)
    if context.method_name == "__call__" and isinstance(module, nn.Embed):
      embeds[-1].setdefault((*module.path, "embedding"), (module, np.asarray(args[0])))
    if context.method_name == "__call__" and isinstance(module, nn.MultiHeadDotProductAttention):
      attentions[-1].setdefault(module.path, (module, np.asarray(outputs)))
    return outputs

  for tokens in (first, other):
    embeds.append({})
    attentions.append({})
    with nn.intercept_methods(interceptor(Hooks(ignore_sites))), nn.intercept_methods(watch):
      logits = module.init_with_output(jax.random.key(0), jnp.asarray(tokens), **kwargs)[0]
  of_tokens = [p for p, (_, x) in embeds[0].items() if not np.array_equal(x, embeds[1][p][1])]
  if not of_tokens:
    raise InputError(
      f"{type(module).__name__} looks up its tokens in no nn.Embed, so it is not known where they"
      " enter it. Use nn.Embed for them, or give a network over embeddings to from_flax."
    )
  if getattr(logits, "ndim", 0) not in (2, 3):
    raise InputError(
      f"{type(module).__name__} returns {jax.tree.map(jnp.shape, logits)} for one sequence;"
      " expected logits, (1, num_classes) or (1, tokens, vocabulary)."
    )
  embed, attention = embeds[0][of_tokens[0]][0], None
  if attentions[0]:
    path = next(iter(attentions[0]))
    layer, outputs = attentions[0][path]
    causal = np.array_equal(outputs[:, 0], attentions[1][path][1][:, 0])
    attention = Attention((*path, "query"), (*path, "key"), layer.num_heads, causal)
  return _Look(of_tokens[0], embed.num_embeddings, embed.features, attention, logits.ndim == 3)
