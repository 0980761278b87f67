"""What a gradient gives away without any search."""

from jaxdia.closed_form.labels import recover_labels

__all__ = ["recover_labels"]
