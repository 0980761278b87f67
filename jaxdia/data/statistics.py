"""Public statistics of the usual data sets."""

from jaxdia.core.errors import unknown
from jaxdia.core.types import Statistics

# MNIST, CIFAR-10 and ImageNet: as the paper's authors use them. The other two: of the training
# sets, as commonly published.
STATISTICS: dict[str, Statistics] = {
  "mnist": Statistics((0.13066373765468597,), (0.30810782313346863,)),
  "fashion_mnist": Statistics((0.2860,), (0.3530,)),
  "cifar10": Statistics(
    (0.4914672374725342, 0.4822617471218109, 0.4467701315879822),
    (0.24703224003314972, 0.24348513782024384, 0.26158785820007324),
  ),
  "cifar100": Statistics((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
  "imagenet": Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

# For data of which nothing is public: pixels become values in [-1, 1].
NEUTRAL = Statistics((0.5,), (0.5,))


def statistics_of(name: str) -> Statistics:
  """Returns the statistics of a data set by name, or `NEUTRAL` for "neutral".

  Args:
    name: a key of `STATISTICS`, or "neutral".

  Raises:
    InputError: there is no such name.
  """
  known = STATISTICS | {"neutral": NEUTRAL}
  if name not in known:
    raise unknown("statistics", name, known)
  return known[name]
