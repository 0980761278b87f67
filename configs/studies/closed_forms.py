"""The closed forms, alone and as a start of DIA, against the searches.

The LeNet and the ViT are attacked on fewer images, the ViT also more briefly; with ":full" after
the name of this file they are not.

python launch/evaluate.py --config=configs/studies/closed_forms.py --workdir=runs/closed_forms
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
  base.attack.name = "ig,wiig,dia,closed_form,hybrid"
  base.attack.max_iterations = 2_000
  base.model.dropout_rate = 0.5
  base.data.count = 8
  lenet = (("data.count", 4),)
  vit = (("data.count", 2), ("attack.max_iterations", 1_000))
  if size == "full":
    lenet = vit = ()
  elif size != "small":
    raise unknown("size of the study:", size, ("small", "full"))
  return study_config(
    "Closed forms",
    "What does the gradient give away without any search?",
    base,
    variants=[
      (("model.name", "mlp"), ("data.batch_size", 1)),
      (("model.name", "mlp"), ("data.batch_size", 8)),
      (("model.name", "lenet"), *lenet),
      (("model.name", "vit"), *vit),
    ],
  )
