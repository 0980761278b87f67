"""A convolutional network in the manner of LeNet."""

from flax import linen as nn

from jaxdia.core.types import Images, Logits
from jaxdia.models.zoo.layers import convolution, dense


class LeNet(nn.Module):
  """A LeNet in the manner of Zhu et al. 2019, with GELU, a hidden layer and dropout.

  Three 5x5 convolutions of strides 2, 2, 1, each followed by dropout, then a
  hidden dense layer with dropout before the classifier. The activation is
  smooth because the attacks differentiate the gradient.

  Attributes:
    num_classes: number of logits.
    dropout_rate: after each convolution and before the classifier.
    channels: of each convolution.
    hidden_size: width of the hidden dense layer.
  """

  num_classes: int
  dropout_rate: float = 0.25
  channels: int = 12
  hidden_size: int = 256

  @nn.compact
  def __call__(self, images: Images, train: bool = True) -> Logits:
    """Returns f[B, num_classes] logits of f[B, H, W, C] images; drops only if `train`."""
    x = images
    for i, stride in enumerate((2, 2, 1)):
      x = nn.gelu(convolution(x, self.channels, 5, stride, f"conv_{i}"), approximate=False)
      x = nn.Dropout(self.dropout_rate, name=f"dropout_{i}")(x, deterministic=not train)
    x = dense(x.reshape(x.shape[0], -1), self.hidden_size, "hidden")
    x = nn.gelu(x, approximate=False)
    x = nn.Dropout(self.dropout_rate, name="dropout_3")(x, deterministic=not train)
    return dense(x, self.num_classes, "classifier")


NETWORKS = {"lenet": (LeNet, {})}
