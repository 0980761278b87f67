"""Optimisers and learning rates of the search, from optax."""

from typing import Any

import jax.numpy as jnp
import optax

from jaxdia.attacks.settings import AttackSettings


def create_optimizer(settings: AttackSettings) -> optax.GradientTransformationExtraArgs:
  """Returns the optimiser of a `Candidate`, before the learning rate.

  Args:
    settings: names it.

  Returns:
    An optax transformation whose updates, times the learning rate, are added to
    the candidate.
  """
  if settings.optimizer == "lbfgs":
    return optax.lbfgs()
  steps = [optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8), optax.scale(-1.0)]
  if settings.optimizer == "signed_adam":

    def sign_images(grad: Any, _: Any) -> Any:  # a `Candidate`, of which optax knows nothing
      return grad._replace(images=jnp.sign(grad.images))

    steps.insert(0, optax.stateless(sign_images))
  return optax.with_extra_args_support(optax.chain(*steps))


def create_schedule(settings: AttackSettings) -> optax.Schedule:
  """Returns the factor of the learning rate as a function of the iteration.

  Args:
    settings: names it; of the schedule "plateau" this part is constant.

  Returns:
    An optax schedule.
  """
  if settings.schedule == "step":
    eighths = (3, 5, 7)
    return optax.piecewise_constant_schedule(
      1.0, {settings.max_iterations * n // 8: 0.1 for n in eighths}
    )
  if settings.schedule == "cosine":
    return optax.cosine_decay_schedule(1.0, settings.max_iterations)
  return optax.constant_schedule(1.0)


def create_plateau(
  settings: AttackSettings, dtype: jnp.dtype
) -> optax.GradientTransformationExtraArgs:
  """Returns PyTorch's ReduceLROnPlateau, which the authors use.

  optax reduces when the count of bad iterations reaches its patience, PyTorch
  when it exceeds it. PyTorch also makes no reduction of less than 1e-8, which
  here is the least factor.

  Args:
    settings: of the schedule "plateau"; any other gives a factor of 1. Its numbers may be
      traced.
    dtype: of the objective.

  Returns:
    An optax transformation; only the `scale` of its state is used.
  """
  patience = settings.plateau_patience + 1
  if settings.schedule != "plateau":
    patience = settings.max_iterations + 1  # never reached
  return optax.contrib.reduce_on_plateau(
    factor=settings.plateau_factor,
    patience=patience,
    rtol=1e-4,
    min_scale=jnp.minimum(1.0, 1e-8 / settings.learning_rate).astype(dtype),
  )
