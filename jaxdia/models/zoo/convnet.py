"""A plain deep convolutional network, as gradient inversion is often tried on."""

from flax import linen as nn

from jaxdia.core.errors import InputError, unknown
from jaxdia.core.types import Images, Logits
from jaxdia.models.zoo.layers import ACTIVATIONS, check_groups, convolution, dense, group_norm

_POOLS = {"max": nn.max_pool, "average": nn.avg_pool}
_LEAST_SIZE = 9  # what two poolings of 3 leave something of


class ConvNet(nn.Module):
  """Eight 3x3 convolutions and two poolings, in the manner of Geiping et al. 2020 (ConvNet64).

  In place of their batch normalisation it has group normalisation, and it has dropout after each
  pooling.

  Attributes:
    num_classes: number of logits.
    dropout_rate: after each pooling, of which the last is before the classifier.
    width: channels of the first convolution; the others have 2 and 4 times as many.
    groups: of each group normalisation.
    activation: "relu", "leaky_relu" or "gelu".
    pool: "max" or "average".
  """

  num_classes: int
  dropout_rate: float = 0.25
  width: int = 64
  groups: int = 32
  activation: str = "relu"
  pool: str = "max"

  def check(self, image_shape: tuple[int, int, int]) -> None:
    """Refuses names that there are not, groups that do not fit, and images that are too small."""
    if self.activation not in ACTIVATIONS:
      raise unknown("activation of the model convnet", self.activation, ACTIVATIONS)
    if self.pool not in _POOLS:
      raise unknown("pool of the model convnet", self.pool, _POOLS)
    check_groups(self.width, self.groups)
    if min(image_shape[:2]) < _LEAST_SIZE:
      raise InputError(
        f"images are {image_shape[0]}x{image_shape[1]} pixels; the model convnet, which pools by 3"
        f" twice, takes {_LEAST_SIZE}x{_LEAST_SIZE} and more."
      )

  @nn.compact
  def __call__(self, images: Images, train: bool = True) -> Logits:
    """Returns f[B, num_classes] logits of f[B, H, W, C] images; drops only if `train`."""
    x = images
    for i, factor in enumerate((1, 2, 2, 4, 4, 4, 4, 4)):
      x = convolution(x, factor * self.width, 3, 1, f"conv_{i}")
      x = ACTIVATIONS[self.activation](group_norm(x, self.groups, f"norm_{i}"))
      if i in (5, 7):
        x = _POOLS[self.pool](x, (3, 3), (3, 3))
        dropout = nn.Dropout(self.dropout_rate, name=f"dropout_{i // 7}")
        x = dropout(x, deterministic=not train)
    return dense(x.reshape(x.shape[0], -1), self.num_classes, "classifier")


NETWORKS = {"convnet": (ConvNet, {})}
