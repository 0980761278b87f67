"""Weights of the authors' PyTorch models as params of ours."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxdia.core.types import Params


def params_of_reference(
  state: Mapping[str, Float[np.ndarray, "..."]], image_shape: tuple[int, int, int]
) -> Params:
  """Returns the params of `mlp` or `vit` with the weights of the authors' model.

  Args:
    state: arrays by their names in the `state_dict` of the authors' MLP or ViT, or
      a gradient by the same names.
    image_shape: (height, width, channels).

  Returns:
    A tree like the params of `jaxdia.models.create("mlp" or "vit", ...)`.
  """
  if "layers.0.linear.weight" in state:
    return _mlp(state, image_shape)
  depth = len([name for name in state if name.endswith("to_qkv.weight")])
  return {
    "patch_embedding": _dense(state, "to_patch_embedding.1"),
    "class_token": jnp.asarray(state["cls_token"]),
    "position_embedding": jnp.asarray(state["pos_embedding"]),
    **{f"block_{i}": _block(state, f"transformer.layers.{i}") for i in range(depth)},
    "norm": _norm(state, "mlp_head.0"),
    "classifier": _dense(state, "mlp_head.1"),
  }


def _mlp(state, image_shape) -> dict[str, Any]:
  last = len(state) - 1
  names = [f"hidden_{i}" for i in range(last)] + ["classifier"]
  params = {name: _dense(state, f"layers.{i}.linear") for i, name in enumerate(names)}
  # Theirs flattens images with the channels first.
  height, width, channels = image_shape
  first = params["hidden_0"]["kernel"].reshape(channels, height, width, -1)
  params["hidden_0"]["kernel"] = jnp.moveaxis(first, 0, 2).reshape(height * width * channels, -1)
  return params


def _block(state, name) -> dict[str, Any]:
  attention, mlp = f"{name}.0", f"{name}.1"
  return {
    "attention_norm": _norm(state, f"{attention}.norm"),
    "qkv": _dense(state, f"{attention}.fn.to_qkv"),
    "projection": _dense(state, f"{attention}.fn.to_out.0"),
    "mlp_norm": _norm(state, f"{mlp}.norm"),
    "mlp_hidden": _dense(state, f"{mlp}.fn.net.0"),
    "mlp_output": _dense(state, f"{mlp}.fn.net.3"),
  }


def _dense(state, name) -> dict[str, Any]:
  layer = {"kernel": jnp.asarray(state[f"{name}.weight"]).T}
  if f"{name}.bias" in state:
    layer["bias"] = jnp.asarray(state[f"{name}.bias"])
  return layer


def _norm(state, name) -> dict[str, Any]:
  return {
    "scale": jnp.asarray(state[f"{name}.weight"]),
    "bias": jnp.asarray(state[f"{name}.bias"]),
  }
