"""The effect of dropout on IG, WIIG and DIA, for each architecture.

Without dropout IG, WIIG and DIA are one program, so there IG alone is run. The ViT, the ConvNet
and the ResNet are attacked more briefly, the ViT on fewer images, and the ConvNet is a narrow one;
with ":full" after the name of this file they are not.

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
  base.attack.max_iterations = 3_000
  base.data.count = 8
  vit = (("data.count", 2), ("attack.max_iterations", 1_500))
  convnet = (("model.width", 16), ("model.groups", 8), ("attack.max_iterations", 400))
  resnet = (("attack.max_iterations", 800),)
  if size == "full":
    vit, convnet, resnet = (), (), ()
    base.attack.max_iterations = 20_000
  elif size != "small":
    raise unknown("size of the study:", size, ("small", "full"))
  # Images other than those on which the settings were chosen.
  colour = (("data.source", "samples:cifar10"), ("data.offset", 8))
  # Of deep networks the paper's total variation leaves noise, and its learning rate takes long.
  deep = (*colour, ("attack.schedule", "cosine"))
  convnet += (*deep, ("attack.learning_rate", 0.3), ("attack.tv_weight", 3e-3))
  resnet += (*deep, ("attack.learning_rate", 1.0), ("attack.tv_weight", 0.02))
  smooth = (("model.activation", "gelu"), ("model.pool", "average"))
  kinked = (("model.activation", "relu"), ("model.pool", "max"))
  of_mlp, of_lenet, of_convolutions = "ig,wiig,dia", "ig,wiig,dia,dia_tv", "ig,wiig,dia,hybrid"
  networks = [
    ((("model.name", "mlp"),), of_mlp),
    ((("model.name", "lenet"),), of_lenet),
    ((("model.name", "lenet"), *colour), of_lenet),
    ((("model.name", "vit"), *vit), of_mlp),
    ((("model.name", "convnet"), *smooth, *convnet), of_convolutions),
    ((("model.name", "convnet"), *kinked, *convnet), of_convolutions),
    ((("model.name", "resnet18"), ("attack.optimizer", "adam"), *resnet), of_convolutions),
  ]
  return study_config(
    "Architectures",
    "For which kinds of network does dropout keep images from the server?",
    base,
    variants=[
      (*network, ("model.dropout_rate", rate), ("attack.name", names if rate else "ig"))
      for network, names in networks
      for rate in (0.0, 0.5)
    ],
  )
