"""Reads the tokens of a batch from the gradient of a language model in training mode."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer

from jaxdia.client import Observation
from jaxdia.closed_form.span import Span, find_span
from jaxdia.closed_form.tokens import rows
from jaxdia.closed_form.tokens.first_layer import FirstTokenLayer, find_first_layer
from jaxdia.closed_form.tokens.sentences import find_sentences
from jaxdia.core.errors import InputError
from jaxdia.core.trees import leaves_by_path
from jaxdia.core.types import Masks
from jaxdia.models import expected_masks
from jaxdia.models.tokens import TokenModel

NO_TOKEN = -1
# Least squares on all rows that were found leave no more of a gradient than this, but for noise,
# if the rows are right.
_LEFT = 1e-4
# Where noise takes more of a row out of the space, nothing is called exact.
_EXACT = 1e-3


@dataclasses.dataclass(frozen=True)
class Reading:
  """What was read of a batch.

  Attributes:
    tokens: i[B, T], `NO_TOKEN` where none was found.
    masks: {site: f[B, T, D]} of the dropout between embedding and first layer; empty without.
    verdict: "exact": each token has a mask that fits the gradient to its rounding, and the
      sequences are proven; "tokens": so have all tokens, but which of them make a sequence is a
      guess; "partial": some rows were not found; "nothing".
    reason: for people.
    read: b[B, T], the tokens that have such a mask.
  """

  tokens: Integer[np.ndarray, "batch tokens"]
  masks: Masks
  verdict: str
  reason: str
  read: Bool[np.ndarray, "batch tokens"]


class _Problem(NamedTuple):
  """What a batch is read from: shape of the batch, layer, gradients of its kernels, their space."""

  shape: tuple[int, int]
  layer: FirstTokenLayer
  kernels: list[Float[np.ndarray, "width outputs"]]
  rank: int
  span: Span


class _Rows(NamedTuple):
  """Rows that were found, at positions, with masks."""

  position: Integer[np.ndarray, " n"]
  token: Integer[np.ndarray, " n"]
  mask: Bool[np.ndarray, "n width"]


def read(model: TokenModel, observation: Observation, *, dropout: bool = True) -> Reading:
  """Reads the tokens of a batch, their masks and their order from a gradient.

  Nothing is told but the gradient of one step, and nothing is searched. The layer that the
  embeddings meet first tells the space of its inputs; each token at each position is held
  against it under all masks that there can be (`rows`), and attention tells which tokens belong
  together (`sentences`). Where the embedding is trained, the rows of its gradient that are not zero
  say which tokens there are at all. Of a network that predicts the next token the last one of each
  sequence only acts as a label; it is read from the layer that gives the logits, if at all.

  Args:
    model: the client's network.
    observation: of one client.
    dropout: whether masks are sought; False checks spans as if there was none (DAGER, Petrov et
      al. 2024, the first step of it), which takes the nearest tokens.

  Raises:
    InputError: the gradient of the layer that the tokens meet first was not sent.
  """
  shape = (observation.batch_size, model.length)
  layer = find_first_layer(model, observation.params)
  gradients = leaves_by_path(observation.gradient)
  if missing := [path for path in layer.paths if (*path, "kernel") not in gradients]:
    raise InputError(
      f"the gradient of {'/'.join(missing[0])!r} was not sent, which is what tells tokens."
    )
  kernels = [_matrix(gradients[*path, "kernel"], layer.width) for path in layer.paths]
  span = find_span(kernels, shape[0] * shape[1])
  if span is None:
    return _nothing(
      shape,
      f"the rows of {shape[0]} sequences of {shape[1]} tokens fill the width of {layer.width}, or"
      " noise does: the gradient of the first layer shows no space that they span",
    )
  rank = span.basis.shape[1]
  if layer.is_normalised:
    span = span.extended(np.stack([layer.scale, layer.shift], axis=1))
  sent = tokens_sent(model, observation)
  sent = np.arange(model.network.vocabulary) if sent is None else sent

  def candidates(position):
    return layer.candidates(position)[sent]

  if not dropout:
    found = rows.find_nearest(span, candidates, shape[1], shape[0])
  elif layer.site is None:
    limit = min(span.outside, rows.MOST_OUTSIDE)
    found = rows.find_nearest(span, candidates, shape[1], shape[0], limit)
  else:
    found = rows.find_rows(span, candidates, shape[1], shape[0], rank)
  if not found:
    return _nothing(shape, "no token fits the space of the first layer under any mask")
  table = _Rows(
    np.array([p for p, _ in found]),
    sent[[row.token for _, row in found]],
    np.stack([row.mask for _, row in found]),
  )
  problem = _Problem(shape, layer, kernels, rank, span)
  return _put_together(model, observation, problem, table, dropout)


def tokens_sent(model: TokenModel, observation: Observation) -> Integer[np.ndarray, " sent"] | None:
  """Returns the tokens that a trained embedding tells of: its gradient has a row for each.

  Args:
    model: the client's network.
    observation: of one client.

  Returns:
    Numbers of tokens, in ascending order; None if no gradient of the embedding was sent, or it has
    rows for all, as where it gives the logits too.
  """
  gradient = leaves_by_path(observation.gradient).get(model.network.table)
  if gradient is None:
    return None
  sent = np.flatnonzero(np.any(np.asarray(gradient) != 0, axis=1))
  return sent if 0 < len(sent) < len(gradient) else None


def _put_together(
  model: TokenModel, observation: Observation, problem: _Problem, table: _Rows, dropout: bool
) -> Reading:
  """Orders rows to sequences, and says how certain they are."""
  shape, layer, kernels, rank, span = problem
  inputs = layer.inputs(table.position, table.token, table.mask)
  solved = [np.linalg.lstsq(inputs.T, kernel, rcond=None)[0] for kernel in kernels]
  left = max(
    float(np.linalg.norm(kernel - inputs.T @ s) / np.linalg.norm(kernel))
    for kernel, s in zip(kernels, solved, strict=True)
  )
  grouped, outside = _in_order(table.position), np.full(len(inputs), np.inf)
  attention = model.network.attention
  if attention is not None and {attention.query, attention.key} <= set(layer.paths):
    key = leaves_by_path(observation.params)[*attention.key, "kernel"]
    heads = (len(inputs), attention.num_heads, -1)
    grouped, outside = find_sentences(
      (inputs @ _matrix(key, layer.width)).reshape(heads),
      solved[layer.paths.index(attention.query)].reshape(heads),
      table.position,
      shape[0],
      attention.causal,
    )
  tokens, read = np.full(shape, NO_TOKEN), np.zeros(shape, bool)
  masks = np.ones((*shape, layer.width), np.float32)
  place = grouped, table.position
  tokens[place], read[place], masks[place] = table.token, dropout, table.mask
  if layer.site is None:
    _share(tokens, read)
  named: Masks = {} if layer.site is None or not dropout else {layer.site: jnp.asarray(masks)}
  if not dropout:
    return Reading(tokens, named, "partial", "the nearest tokens, as if there was no dropout", read)
  limit = max(_LEFT, span.outside)
  if len(inputs) != rank or left > limit:
    reason = f"of {rank} rows of the first layer {len(inputs)} were found"
    if layer.site is None:
      reason += "; without dropout rows of other tokens lie in their space too, as sums of rows"
    return Reading(tokens, named, "partial", reason, read)
  reason = f"all {rank} rows of the first layer were found, each with its mask;"
  reason += f" they leave {left:.1e} of its gradient"
  told = outside[np.isfinite(outside)]
  # In a head that is narrower than a sequence is long any derivative lies in the span.
  width = layer.width // attention.num_heads if attention else 0
  proven = shape[1] <= width and len(told) > 0 and told.max() <= 10 * limit
  if proven:
    reason += f", and attention proves the sequences ({told.max():.1e} is left)"
  if not read.all():
    tokens = _read_last(model, observation, tokens, named)
    reason += "; last tokens act as labels alone, and are a guess, if any"
  is_exact = proven and read.all() and span.outside <= _EXACT
  return Reading(tokens, named, "exact" if is_exact else "tokens", reason, read)


def _share(tokens: np.ndarray, read: np.ndarray) -> None:
  """Gives a token that alone was found at a position to all sequences: without dropout it is one
  row for all that have it there.
  """
  for position in range(tokens.shape[1]):
    found = tokens[read[:, position], position]
    if len(found) == 1:
      tokens[:, position], read[:, position] = found[0], True


def _in_order(positions: np.ndarray) -> np.ndarray:
  """Returns sequences of which nothing is known."""
  counts: dict[int, int] = {}
  sequence = []
  for position in positions.tolist():
    sequence.append(counts.get(position, 0))
    counts[position] = sequence[-1] + 1
  return np.array(sequence)


def _matrix(leaf: Any, width: int) -> Float[np.ndarray, "width outputs"]:
  return np.asarray(leaf, np.float64).reshape(width, -1)


def _nothing(shape: tuple[int, int], reason: str) -> Reading:
  return Reading(np.full(shape, NO_TOKEN), {}, "nothing", reason, np.zeros(shape, bool))


def _read_last(
  model: TokenModel,
  observation: Observation,
  tokens: Integer[np.ndarray, "batch tokens"],
  masks: Masks,
) -> Integer[np.ndarray, "batch tokens"]:
  """Guesses tokens that act as labels alone, from the layer that gives the logits.

  Its kernel's gradient is `hidden.T @ (probabilities - labels) / count`: the column of a token is
  minus the hidden vectors that it is the label of, but for the probabilities. What dropout made
  of the hidden vectors is not known but for the masks that were found; with expected masks
  elsewhere they are near enough to tell tokens apart.
  """
  missing = np.argwhere(tokens == NO_TOKEN)
  head = _head_of(model, observation)
  if not len(missing) or not (missing[:, 1] == model.length - 1).all() or head is None:
    return tokens
  filled = np.where(tokens == NO_TOKEN, 0, tokens)
  hidden, probabilities = _hidden(model, observation.params, masks, jnp.asarray(filled), head)
  hidden, probabilities = (np.asarray(x, np.float64) for x in (hidden, probabilities))
  size, length = tokens.shape
  kernel = leaves_by_path(observation.gradient)[*head, "kernel"]
  column = np.asarray(kernel, np.float64) * size * (length - 1)
  expected = np.einsum("btd,btv->dv", hidden[:, :-1], probabilities[:, :-1])
  for b, t in np.argwhere(tokens[:, 1:] != NO_TOKEN):
    expected[:, tokens[b, t + 1]] -= hidden[b, t]
  rest = expected - column  # the hidden vectors before the last tokens, in their columns
  tokens = tokens.copy()
  for b in sorted(missing[:, 0]):
    before = hidden[b, -2]
    tokens[b, -1] = int(np.argmax(before @ rest / (before @ before)))
    rest[:, tokens[b, -1]] -= before
  return tokens


def _head_of(model: TokenModel, observation: Observation):
  """Returns the path of the dense layer that gives the logits of all positions, or None."""
  if not model.network.predicts_tokens:
    return None
  for layer in reversed(model.model.dense(1)):
    path = (*layer.path, "kernel")
    if layer.outputs == model.network.vocabulary and path in leaves_by_path(observation.gradient):
      return layer.path
  return None


def _hidden(
  model: TokenModel, params: Any, masks: Masks, tokens: jax.Array, head: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
  """Returns what the head is given, f[B, T, width], and probabilities of the next tokens."""
  masks = expected_masks(model.model, len(tokens)) | masks
  layers = {layer.path: layer for layer in model.model.dense(len(tokens))}
  taps = {head: tuple(jnp.zeros(shape) for shape in layers[head].shapes)}
  images = model.embed(params, tokens)
  logits, inputs = model.model.apply_tapped(params, masks, images, taps)
  logits = logits.reshape(*tokens.shape, -1)
  return inputs[head][0].reshape(*tokens.shape, -1), jax.nn.softmax(logits)
