"""An audit of what clients sent, given the weights that the server had sent them.

python launch/audit.py --config=configs/audit.py --config.model.name=mlp \\
    --config.before=before.npz --config.after=after.npz \\
    --config.learning_rate=0.1 --config.batch_size=4 --config.statistics=mnist
"""

import ml_collections

from jaxdia import audit


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; the file names and what is known of the client are to be set."""
  config = audit.default_config()
  # The network: a built-in one, or the import path of your own, with its arguments beside.
  config.model.name = "mlp"
  config.model.dropout_rate = 0.5
  config.image_shape = (28, 28, 1)
  config.num_classes = 10
  # config.before: weights that the server sent. config.after: weights that came back, or
  # config.difference: these minus those before, or config.gradient: gradients. Several files are
  # separated by commas, each is an update; config.before then holds one, or one for each, and so
  # do config.labels, 3,1;4,1 of two updates of two images.
  # config.learning_rate, config.weight_decay: of the client. Of several local steps also
  # config.local_epochs, config.local_steps of each, config.optimizer, config.momentum, and
  # config.clients whose updates were averaged.
  config.batch_size = 1
  # What normalised the images: a data set's name in config.statistics, or config.mean and
  # config.std. By default the network was fed with pixels from 0 to 1.
  # config.defence.name, and its fields: what the client did to its gradient.
  # config.loss.kind, config.loss.reduction, config.loss.label_smoothing: what the client descended.
  # A kind mypackage:loss is a function of your own.
  # config.mode: "training", in which dropout is on, or "evaluation".
  config.seconds = 60.0
  # config.truth: an npz file with images and labels, for scores; no attempt is shown it.
  return config
