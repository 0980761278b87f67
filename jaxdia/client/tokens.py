"""What a client that trains a language model computes."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from jaxdia.client.defences import Defence, Step, as_defence, identity
from jaxdia.client.losses import CROSS_ENTROPY, Loss
from jaxdia.client.observation import Observation
from jaxdia.client.step import DEFENCE_STREAM
from jaxdia.core.errors import InputError
from jaxdia.core.trees import leaves_by_path, with_leaves
from jaxdia.core.types import (
  Array,
  Gradient,
  Key,
  Labels,
  LabelsLike,
  Logits,
  Masks,
  Params,
  TokensLike,
)
from jaxdia.models import sample_masks
from jaxdia.models.tokens import TokenModel, Tokens


class TokenSecret(NamedTuple):
  """What stays with the client. Evaluation alone may see it.

  Attributes:
    tokens: i[B, T].
    labels: i[B]; None if the next token is predicted.
    masks: of the training step.
  """

  tokens: Tokens
  labels: Labels | None
  masks: Masks


@dataclasses.dataclass(frozen=True)
class NextToken:
  """The cross-entropy of the next token, a mean over all positions but the last.

  Attributes:
    vocabulary: number of tokens there are.
  """

  vocabulary: int

  def __call__(self, logits: Logits, targets: Float[Array, "batch classes"]) -> Float[Array, ""]:
    """Computes the loss.

    Args:
      logits: f[B, T * vocabulary].
      targets: likewise, probabilities of the next tokens.
    """
    logits, targets = (x.reshape(len(x), -1, self.vocabulary)[:, :-1] for x in (logits, targets))
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1))

  def targets(self, tokens: Tokens) -> Float[Array, "batch classes"]:
    """Returns the probabilities of the next tokens: f[B, T * vocabulary], 0 or 1.

    Args:
      tokens: i[B, T].
    """
    following = jnp.roll(tokens, -1, axis=1)
    return jax.nn.one_hot(following, self.vocabulary).reshape(len(tokens), -1)


def observe_tokens(
  key: Key,
  model: TokenModel,
  params: Params,
  tokens: TokensLike,
  labels: LabelsLike | None = None,
  *,
  frozen_embedding: bool = True,
  defence: Defence = identity,
) -> tuple[Observation, TokenSecret]:
  """Plays the training step of a client that draws its dropout masks.

  Args:
    key: random key, from which the masks are drawn.
    model: the network.
    params: its parameters.
    tokens: i[B, T].
    labels: i[B], classes of the sequences, which are revealed; None if the next token is
      predicted, which the server is not told.
    frozen_embedding: whether the token embedding is not trained, so that no gradient of it is
      sent; that of one that is trained has a row for each token that the client has.
    defence: what the client does to its gradient, which the server knows.

  Returns:
    What the server sees, of which the statistics are the box of the embeddings, and what not.

  Raises:
    InputError: tokens or labels that the model cannot have been trained on.
  """
  tokens = _check_tokens(model, tokens)
  if (labels is None) != model.network.predicts_tokens:
    raise InputError(
      f"labels are {'missing' if labels is None else 'given'}, but {model.network.name} predicts"
      f" {'the next token' if labels is not None else 'a class'}. Create the model"
      f" {'with num_classes' if labels is not None else 'without num_classes'}, or"
      f" {'leave labels out' if labels is not None else 'give labels'}."
    )
  dtype = jnp.result_type(*jax.tree.leaves(params))
  masks = sample_masks(key, model.model, len(tokens), dtype)
  defence = as_defence(defence)
  if labels is None:
    following = NextToken(model.network.vocabulary)
    loss, targets = Loss(following), following.targets(tokens)
  else:
    loss, targets = CROSS_ENTROPY, jnp.asarray(labels, jnp.int32)
    labels = targets
  gradient = _gradient(model, params, masks, tokens, targets, loss)
  if frozen_embedding:
    leaves = leaves_by_path(gradient)
    gradient = with_leaves(gradient, leaves | {model.network.table: None})
  images = model.embed(params, tokens)
  step = Step(model.model, params, masks, images, targets, loss)
  mean, std = model.statistics(params)
  observation = Observation(
    params=params,
    gradient=defence(jax.random.fold_in(key, DEFENCE_STREAM), gradient, step),
    labels=labels,
    mean=mean,
    std=std,
    batch_size=len(tokens),
    loss=loss,
    defence=defence,
  )
  return observation, TokenSecret(tokens, labels, masks)


@functools.partial(jax.jit, static_argnames="loss")
def _gradient(
  model: TokenModel, params: Params, masks: Masks, tokens: Tokens, labels: Labels, loss: Loss
) -> Gradient:
  return jax.grad(lambda p: loss(model.apply(p, masks, tokens), labels))(params)


def _check_tokens(model: TokenModel, tokens: Any) -> Integer[jax.Array, "batch tokens"]:
  tokens = np.asarray(tokens)
  if tokens.ndim != 2 or tokens.shape[1] != model.length or not tokens.shape[0]:
    raise InputError(
      f"tokens have shape {tokens.shape}; expected (B, {model.length}) with B at least 1. Cut"
      " sequences to one length, or create the model for theirs."
    )
  if not np.issubdtype(tokens.dtype, np.integer):
    raise InputError(f"tokens are {tokens.dtype}; expected integers, numbers of a vocabulary.")
  if tokens.min() < 0 or tokens.max() >= model.network.vocabulary:
    raise InputError(
      f"tokens are from {tokens.min()} to {tokens.max()}; expected 0 to"
      f" {model.network.vocabulary - 1}, as the model's vocabulary has."
    )
  return jnp.asarray(tokens, jnp.int32)
