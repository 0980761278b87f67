"""Labels from the gradient of the classifier."""

import jax
import jax.numpy as jnp

from jaxdia.client import Observation
from jaxdia.errors import InputError
from jaxdia.matching import layer_gradient
from jaxdia.models import DropoutModel
from jaxdia.typing import Labels


def recover_labels(model: DropoutModel, observation: Observation) -> Labels:
  """Reads the label of a single image from the gradient of the classifier.

  The gradient by the logits is softmax - one-hot: negative for the true class
  only (iDLG, Zhao et al. 2020), and, as it sums to zero, largest in size there.
  So the label is the least entry of the bias gradient or, where the classifier
  has no bias, the column of the kernel gradient with the largest norm, whatever
  the sign of its inputs. (Of two classes without a bias the columns are equal;
  then the answer is arbitrary.)

  Args:
    model: the network; its `classifier` says where to look.
    observation: of a batch of one image.

  Returns:
    i[1], the label.

  Raises:
    InputError: the batch is larger, or the model has no known classifier.
  """
  if observation.batch_size != 1:
    raise InputError(
      f"labels=recovered is for one image, not for a batch of {observation.batch_size}. Use"
      " batch_size=1, or labels=free or labels=given."
    )
  if model.classifier is None:
    raise InputError(
      "labels=recovered reads the gradient of a dense layer that gives the logits; this model"
      " has none. Use labels=free or labels=given."
    )
  layer = layer_gradient(observation.gradient, model.classifier)
  if "bias" in layer:
    label = jnp.argmin(layer["bias"])
  else:
    label = jnp.argmax(jnp.sum(jnp.square(layer["kernel"]), axis=0))
  return jax.lax.convert_element_type(label, jnp.int32)[None]
