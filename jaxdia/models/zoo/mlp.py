"""The paper's MLP."""

from collections.abc import Sequence

from flax import linen as nn

from jaxdia.core.errors import unknown
from jaxdia.core.types import Images, Logits
from jaxdia.models.zoo.layers import ACTIVATIONS, dense


class MLP(nn.Module):
  """The paper's MLP: dense layers with GELU and dropout, and a dense classifier.

  Attributes:
    num_classes: number of logits.
    dropout_rate: after each hidden layer.
    hidden_sizes: width of each hidden layer.
    use_bias: in all layers.
    activation: "gelu" as in the paper, "relu" or "leaky_relu".
  """

  num_classes: int
  dropout_rate: float = 0.25
  hidden_sizes: Sequence[int] = (512, 512, 512)
  use_bias: bool = False
  activation: str = "gelu"

  def check(self, image_shape: tuple[int, int, int]) -> None:
    """Refuses an activation that there is not."""
    del image_shape
    if self.activation not in ACTIVATIONS:
      raise unknown("activation of the model mlp", self.activation, ACTIVATIONS)

  @nn.compact
  def __call__(self, images: Images, train: bool = True) -> Logits:
    """Returns f[B, num_classes] logits of f[B, H, W, C] images; drops only if `train`."""
    x = images.reshape(images.shape[0], -1)
    for i, size in enumerate(self.hidden_sizes):
      x = dense(x, size, f"hidden_{i}", self.use_bias)
      x = ACTIVATIONS[self.activation](x)
      x = nn.Dropout(self.dropout_rate, name=f"dropout_{i}")(x, deterministic=not train)
    return dense(x, self.num_classes, "classifier", self.use_bias)


NETWORKS = {"mlp": (MLP, {})}
