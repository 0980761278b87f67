"""What a gradient gives away without any search."""

from jaxdia.closed_form.labels import check_sign, is_turned, recover_labels
from jaxdia.closed_form.parts import NO_LABEL, Parts, Recovery, Verdict
from jaxdia.closed_form.recovery import recover
from jaxdia.closed_form.structure import find_chain

__all__ = [
  "NO_LABEL",
  "Parts",
  "Recovery",
  "Verdict",
  "check_sign",
  "find_chain",
  "is_turned",
  "recover",
  "recover_labels",
]
