"""The built-in networks: ordinary Flax modules, a file for each kind.

A file names its networks in `NETWORKS = {name: (module class, arguments that differ from its
defaults)}`. The class takes `num_classes` and `dropout_rate`, and may have a method
`check(image_shape)` that refuses what it cannot take.
"""

import importlib
import pkgutil
from typing import Any

from flax import linen as nn

MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {}
for _file in sorted(info.name for info in pkgutil.iter_modules(__path__)):
  MODELS |= getattr(importlib.import_module(f"{__name__}.{_file}"), "NETWORKS", {})
