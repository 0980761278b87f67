"""What a gradient gives away without any search."""

from jaxdia.closed_form.labels import check_sign, recover_labels
from jaxdia.closed_form.parts import Parts, Recovery, Verdict
from jaxdia.closed_form.recovery import recover

__all__ = ["Parts", "Recovery", "Verdict", "check_sign", "recover", "recover_labels"]
