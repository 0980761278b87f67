"""How close reconstructed sequences of tokens came to their originals."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Integer
from scipy.optimize import linear_sum_assignment

from jaxdia.core.errors import InputError, first_line

ROUGE = ("rouge1", "rouge2", "rougeL")


def assign_tokens(
  found: Integer[np.ndarray, "batch tokens"], originals: Integer[np.ndarray, "batch tokens"]
) -> Integer[np.ndarray, " batch"]:
  """Returns for each original which found sequence is its own, i[B]: most tokens are right.

  Args:
    found: i[B, T], less than 0 where nothing was found.
    originals: i[B, T].
  """
  right = (found[None] == originals[:, None]).sum(axis=-1)
  return linear_sum_assignment(-right)[1]


def score_tokens(
  found: Integer[np.ndarray, "batch tokens"],
  originals: Integer[np.ndarray, "batch tokens"],
  text: Callable[[Integer[np.ndarray, " tokens"]], str],
) -> list[dict[str, float]]:
  """Scores sequences that stand beside their originals.

  Args:
    found: i[B, T], less than 0 where nothing was found.
    originals: i[B, T], in the same order.
    text: gives the text of a sequence.

  Returns:
    For each sequence `token_accuracy`, the share of positions with the right token; `exact`,
    whether all are right, 0 or 1; `bag_accuracy`, the share of its tokens that were found at any
    position; and the F-measures of ROUGE-1, -2 and -L (package rouge-score, without stemming).

  Raises:
    InputError: the package rouge-score is missing.
  """
  try:
    from rouge_score import rouge_scorer  # an extra
  except ImportError as error:
    raise InputError(
      f'text needs the package rouge-score ({first_line(error)}). Run pip install "jaxdia[text]".'
    ) from error
  scorer = rouge_scorer.RougeScorer(list(ROUGE))
  scores = []
  for mine, original in zip(found, originals, strict=True):
    right = mine == original
    left = original.tolist()
    for token in mine.tolist():
      if token in left:
        left.remove(token)
    rouge = scorer.score(text(original), text(mine))
    scores.append({
      "token_accuracy": float(right.mean()),
      "exact": float(right.all()),
      "bag_accuracy": 1 - len(left) / len(original),
      **{name: float(rouge[name].fmeasure) for name in ROUGE},
    })  # fmt: skip
  return scores
