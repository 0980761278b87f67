"""What an attack is told besides what every server has, for people to read."""

_LABELS = {
  "given": "told the right labels",
  "recovered": "not told the labels: it read them off the gradient",
  "free": "not told the labels: it searched them",
}
_MASKS = {
  "known": "told the client's dropout masks, which no real server has",
  "expected": "not told the dropout masks: it reckoned as if nothing were dropped",
  "free": "not told the dropout masks: it had to find them",
}


def told(masks: str, labels: str) -> str:
  """Returns what an attack is told of the labels and masks and what not, as part of a sentence.

  Args:
    masks: as in `jaxdia.attacks.AttackSettings`.
    labels: likewise.
  """
  return f"{_LABELS[labels]}; {_MASKS[masks]}"
