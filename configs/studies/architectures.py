"""The effect of dropout on IG, WIIG and DIA, for each architecture.

The ViT, and the ResNet, which is a narrow one, are attacked on fewer images and more briefly;
with ":full" after the name of this file they are not, and the ResNet is as wide as in the paper.

python launch/evaluate.py --config=configs/studies/architectures.py --workdir=runs/architectures
"""

import ml_collections

from jaxdia.core.errors import unknown
from jaxdia.experiment.config import config_for
from jaxdia.study import study_config


def get_config(size: str = "small") -> ml_collections.ConfigDict:
  """Returns the config of the study.

  Args:
    size: "small" for two CPU cores and an hour, or "full".
  """
  base = config_for("mlp", "mnist")
  base.attack.name = "ig,wiig,dia"
  base.attack.max_iterations = 3_000
  base.data.count = 8
  vit = (("data.count", 2), ("attack.max_iterations", 1_500))
  resnet = (("data.count", 2), ("attack.max_iterations", 500))
  resnet += (("model.width", 16), ("model.groups", 8))
  if size == "full":
    vit = resnet = ()
  elif size != "small":
    raise unknown("size of the study:", size, ("small", "full"))
  return study_config(
    "Architectures",
    "For which kinds of network does dropout keep images from the server?",
    base,
    variants=[
      (("model.name", "mlp"),),
      (("model.name", "lenet"),),
      (("model.name", "resnet18"), *resnet),
      (("model.name", "vit"), *vit),
    ],
    grid=[("model.dropout_rate", (0.0, 0.5))],
  )
