"""Which tokens were at which position, under dropout: a span check that finds the masks too.

The rows that a dense layer multiplied span the column space of its kernel's gradient (DAGER,
Petrov et al. 2024). Without dropout a token was at a position if its row lies in that space. With
it the row is `mask * candidate`, and for a basis N of what the space leaves out

  (candidate * dropped) @ N == candidate @ N,   dropped in {0, 1},

as many equations as N has columns, for few entries that are 1. All candidates share N, so all are
solved at once, as linear programs; rounding, and least squares for the entries that rounding
leaves unclear, then give a mask to the last bit or show that there is none.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxdia.closed_form.span import OUTSIDE, Span, solve_masks
from jaxdia.core.precision import full_precision

# A program whose solution is not integral is solved again with weights that drive it there.
_ROUNDS = 6
_DRIVE = 2.0
# Of the candidates at a position, the nearest to the space are looked at, and for each row that
# is sought so many of them are made exact.
_CANDIDATES = 256
_POLISHED = 10
_RESTARTS = 8
# Shares of the equations that are spent on entries that are unclear.
_UNCLEAR = (0.4, 0.6, 0.8, 0.9)
# Two masks of one token that differ in less of it are one.
_SAME = 0.05
# Where noise takes more of a row out of the space, nothing could be told.
MOST_OUTSIDE = 0.03


class TokenRow(NamedTuple):
  """A token that was at a position.

  Attributes:
    token: its number.
    mask: b[D], of the dropout between the candidate and the layer.
    outside: share of the row that lies outside of the space.
  """

  token: int
  mask: Bool[np.ndarray, " width"]
  outside: float


def find_rows(
  span: Span,
  candidates: Callable[[int], Float[np.ndarray, "vocabulary width"]],
  positions: int,
  most: int,
  rank: int,
) -> list[tuple[int, TokenRow]]:
  """Finds the tokens at all positions, and their masks.

  Args:
    span: of the rows.
    candidates: `candidates(position)` is what dropout is given for each token there, f[V, D].
    positions: of a sequence.
    most: sequences of the batch.
    rank: rows that there are in all.

  Returns:
    Positions with the rows that were found there.
  """
  projection = jnp.asarray(span.complement @ span.complement.T, jnp.float32)
  places = [_Place(span, projection, candidates(position), most) for position in range(positions)]
  for _ in range(_ROUNDS):
    for place in places:
      if sum(len(p.found) for p in places) < rank:
        place.look()
  return [(position, row) for position, place in enumerate(places) for row in place.found]


class _Place:
  """The search for rows at one position: rounds of programs, a program a candidate with weights."""

  def __init__(self, span: Span, projection: jax.Array, candidates: np.ndarray, most: int):
    self._span, self._projection, self._most = span, projection, most
    self._tokens = _nearest(projection, candidates, min(_CANDIDATES, len(candidates)))
    self._chosen = candidates[self._tokens].astype(np.float64)
    self._weights = np.ones(self._chosen.shape)
    self._rounds = 0
    self._chance = np.random.default_rng(0)
    self.found: list[TokenRow] = []

  def look(self) -> None:
    """Solves a round of programs, and more as long as one finds something."""
    before = -1
    while before < len(self.found) < self._most:
      before = len(self.found)
      self._look_once()
    self._rounds += 1

  def _look_once(self) -> None:
    limit = min(self._span.outside, MOST_OUTSIDE)
    dropped = solve_masks(self._projection, self._chosen, self._weights)
    outside = _outside(self._span, self._chosen, dropped < 0.5)
    order = np.argsort(outside, kind="stable")
    best = order[: _POLISHED * self._most]
    chosen, tokens = self._chosen[best], self._tokens[best]
    masks, outside = _polish(self._span, chosen, dropped[best], limit)
    for i in np.argsort(outside, kind="stable"):
      row = TokenRow(int(tokens[i]), masks[i], float(outside[i]))
      if row.outside <= limit and len(self.found) < self._most and self._is_new(row, chosen[i]):
        self.found.append(row)
    self._go_on(dropped, order)

  def _go_on(self, dropped: np.ndarray, order: np.ndarray) -> None:
    """Makes the next programs: of the nearest tokens, and of those that were found here."""
    again = {row.token for row in self.found}
    nearest = list(dict.fromkeys(self._tokens[order].tolist()))[: 2 * self._most]
    chosen, weights, tokens = [], [], []
    for token in dict.fromkeys([*again, *nearest]):
      i = next(i for i in order if self._tokens[i] == token)
      masks = [row.mask for row in self.found if row.token == token]
      # Away from masks that were found, so that another sequence with the token shows; else the
      # entries that are between 0 and 1 are driven to the nearer one. Chance turns the others.
      first = 0.1 + np.sum(~np.array(masks), axis=0) if masks else 1 + _DRIVE * (0.5 - dropped[i])
      for restart in range(_RESTARTS):
        tokens.append(token)
        chosen.append(self._chosen[i])
        turn = restart + _RESTARTS * self._rounds
        weights.append(first + 0.5 * min(turn, 4) * self._chance.random(len(first)))
    self._tokens, self._chosen = np.array(tokens), np.array(chosen)
    self._weights = np.array(weights)

  def _is_new(self, row: TokenRow, candidate: np.ndarray) -> bool:
    """Returns whether a row is none of those of the same token."""
    size = _SAME * np.linalg.norm(candidate)
    masks = [other.mask for other in self.found if other.token == row.token]
    return all(np.linalg.norm(candidate[row.mask != mask]) > size for mask in masks)


def find_nearest(
  span: Span,
  candidates: Callable[[int], Float[np.ndarray, "vocabulary width"]],
  positions: int,
  most: int,
  limit: float = np.inf,
) -> list[tuple[int, TokenRow]]:
  """Returns the tokens nearest to the space, which are those of a batch without dropout.

  Args:
    span: of the rows.
    candidates: as `find_rows` takes them.
    positions: of a sequence.
    most: so many are returned of each position.
    limit: of what may lie outside of the space.
  """
  projection = jnp.asarray(span.complement @ span.complement.T, jnp.float32)
  found = []
  for position in range(positions):
    rows = candidates(position)
    near = _nearest(projection, rows, min(most, len(rows)))
    kept = np.ones((len(near), rows.shape[1]), bool)
    outside = _outside(span, rows[near], kept)
    found += [
      (position, TokenRow(int(t), m, float(o)))
      for t, m, o in zip(near, kept, outside, strict=True)
      if o <= limit
    ]
  return found


@jax.jit
def _energies(projection, candidates):
  with full_precision():
    left = candidates @ projection
  return jnp.sum(left**2, axis=1) / jnp.maximum(jnp.sum(candidates**2, axis=1), 1e-30)


def _nearest(projection: jax.Array, candidates: np.ndarray, count: int) -> np.ndarray:
  """Returns the candidates of which the least lies outside of the space, the nearest first."""
  energies = np.asarray(_energies(projection, jnp.asarray(candidates, jnp.float32)))
  return np.argsort(energies, kind="stable")[:count]


def _outside(span: Span, candidates: np.ndarray, kept: np.ndarray) -> np.ndarray:
  """Returns the share of rows that lies outside of the space; 1 of rows that are zero."""
  rows = candidates * kept
  size = np.linalg.norm(rows, axis=1)
  left = np.linalg.norm(rows @ span.complement, axis=1)
  # A row of which next to nothing is left tells nothing.
  told = size > 0.1 * np.linalg.norm(candidates, axis=1)
  return np.where(told, left / np.where(size > 0, size, 1), 1)


def _polish(
  span: Span, candidates: np.ndarray, dropped: np.ndarray, limit: float
) -> tuple[np.ndarray, np.ndarray]:
  """Decides entries that a program leaves unclear by least squares, of more and more of them."""
  best = dropped < 0.5
  outside = _outside(span, candidates, best)
  equations = span.complement.shape[1]
  for order in (np.abs(candidates), np.abs(candidates) * np.abs(dropped - 0.5)):
    for share in _UNCLEAR:
      todo = np.flatnonzero(outside > min(limit, OUTSIDE))
      count = int(share * equations)
      if not len(todo) or not count:
        continue
      unclear = np.argsort(order[todo], axis=1, kind="stable")[:, :count]
      kept = dropped[todo] < 0.5
      rest = candidates[todo] * kept
      np.put_along_axis(rest, unclear, 0, axis=1)
      values = np.take_along_axis(candidates[todo], unclear, axis=1)
      system = span.complement[unclear] * values[..., None]  # f[K, count, equations]
      gram = system @ system.transpose(0, 2, 1)
      gram += 1e-13 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(count)
      right = np.einsum("kce,ke->kc", system, -rest @ span.complement)
      decided = np.linalg.solve(gram, right[..., None])[..., 0] > 0.5
      np.put_along_axis(kept, unclear, decided, axis=1)
      now = _outside(span, candidates[todo], kept)
      better = now < outside[todo]
      best[todo[better]], outside[todo[better]] = kept[better], now[better]
  return best, outside
