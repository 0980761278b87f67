"""The data sets that are known by name, each with all that is known of it."""

from typing import NamedTuple

from jaxdia.core.errors import unknown
from jaxdia.core.types import Statistics


class Dataset(NamedTuple):
  """What is public of a data set.

  Attributes:
    samples: how the names of foolbox's files with its images begin; None if it has none.
    num_classes: how many.
    statistics: mean and standard deviation of its pixels.
    class_names: one a class in the order of the labels, or None if they are not kept here.
  """

  samples: str | None
  num_classes: int
  statistics: Statistics
  class_names: tuple[str, ...] | None = None


# The statistics of MNIST, CIFAR-10 and ImageNet: as the paper's authors use them. The other two:
# of the training sets, as commonly published. Of digits: of `sklearn:digits/train`.
DATASETS: dict[str, Dataset] = {
  "mnist": Dataset(
    samples="mnist",
    num_classes=10,
    statistics=Statistics(0.13066373765468597, 0.30810782313346863),
    class_names=tuple("0123456789"),
  ),
  "fashion_mnist": Dataset(
    samples="fashionMNIST",
    num_classes=10,
    statistics=Statistics(0.2860, 0.3530),
    class_names=(
      *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
      *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
  ),
  "cifar10": Dataset(
    samples="cifar10",
    num_classes=10,
    statistics=Statistics(
      (0.4914672374725342, 0.4822617471218109, 0.4467701315879822),
      (0.24703224003314972, 0.24348513782024384, 0.26158785820007324),
    ),
    class_names=(
      *("airplane", "automobile", "bird", "cat", "deer"),
      *("dog", "frog", "horse", "ship", "truck"),
    ),
  ),
  "cifar100": Dataset(
    samples="cifar100",
    num_classes=100,
    statistics=Statistics((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
  ),
  "imagenet": Dataset(
    samples="imagenet",
    num_classes=1000,
    statistics=Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  ),
  "digits": Dataset(
    samples=None,
    num_classes=10,
    statistics=Statistics(0.3054157495498657, 0.37600651383399963),
    class_names=tuple("0123456789"),
  ),
}
STATISTICS: dict[str, Statistics] = {name: known.statistics for name, known in DATASETS.items()}

# For data of which nothing is public: pixels become values in [-1, 1].
NEUTRAL = Statistics(0.5, 0.5)


def statistics_of(name: str) -> Statistics:
  """Returns the statistics of a data set by name, or `NEUTRAL` for "neutral".

  Args:
    name: a key of `DATASETS`, or "neutral".

  Raises:
    InputError: there is no such name.
  """
  known = STATISTICS | {"neutral": NEUTRAL}
  if name not in known:
    raise unknown("statistics", name, known)
  return known[name]
