"""Residual networks."""

import jax.numpy as jnp
from flax import linen as nn

from jaxdia.core.types import Images, Logits
from jaxdia.models.zoo.layers import check_groups, convolution, dense, group_norm


class ResNet18(nn.Module):
  """ResNet-18 (He et al. 2016) with group normalisation and dropout at the end.

  Images of up to 64 pixels get the 3x3 stem that is usual for CIFAR, larger ones
  the 7x7 stem with pooling.

  Attributes:
    num_classes: number of logits.
    dropout_rate: before the classifier.
    width: channels of the first stage; doubled in each of the three others.
    groups: of each group normalisation.
  """

  num_classes: int
  dropout_rate: float = 0.25
  width: int = 64
  groups: int = 32

  def check(self, image_shape: tuple[int, int, int]) -> None:
    """Refuses a width that the groups do not divide."""
    del image_shape
    check_groups(self.width, self.groups)

  @nn.compact
  def __call__(self, images: Images, train: bool = True) -> Logits:
    """Returns f[B, num_classes] logits of f[B, H, W, C] images; drops only if `train`."""

    def norm(x, name):
      return group_norm(x, self.groups, name)

    if max(images.shape[1:3]) <= 64:
      x = nn.relu(norm(convolution(images, self.width, 3, 1, "stem", False), "stem_norm"))
    else:
      x = nn.relu(norm(convolution(images, self.width, 7, 2, "stem", False), "stem_norm"))
      x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    for stage in range(4):
      for block in range(2):
        features = self.width * 2**stage
        stride = 2 if stage > 0 and block == 0 else 1
        name = f"stage_{stage}_block_{block}"
        y = convolution(x, features, 3, stride, f"{name}_conv_0", False)
        y = nn.relu(norm(y, f"{name}_norm_0"))
        y = norm(convolution(y, features, 3, 1, f"{name}_conv_1", False), f"{name}_norm_1")
        if x.shape != y.shape:
          x = norm(convolution(x, features, 1, stride, f"{name}_skip", False), f"{name}_skip_norm")
        x = nn.relu(x + y)
    x = jnp.mean(x, axis=(1, 2))
    x = nn.Dropout(self.dropout_rate, name="dropout")(x, deterministic=not train)
    return dense(x, self.num_classes, "classifier")


NETWORKS = {"resnet18": (ResNet18, {})}
