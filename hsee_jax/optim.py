"""The optimizer without its learning rate, and the learning rate as a function of time.

The rate is passed into every step instead of being counted by the optimizer: in the
sequential strategy deep server layers see more updates a step than shallow ones, and a
count of their own would let their schedules drift apart.
"""

import jax
import optax

from hsee_jax.base import PyTree
from hsee_jax.config import OptimConfig


def _decays(params: PyTree) -> PyTree:
    """True on matrices and convolutions, false on biases and BatchNorm."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """The update direction of one layer, to be scaled by ``-learning_rate``."""
    decay = optax.add_decayed_weights(config.weight_decay, mask=_decays)
    if config.optimizer == "adamw":
        return optax.chain(optax.scale_by_adam(), decay)
    return optax.chain(decay, optax.trace(config.momentum))


def make_schedule(
    config: OptimConfig, *, num_rounds: int, steps_per_round: int
) -> optax.Schedule:
    """Learning rate of each global step: linear warm-up, then cosine to 0 or constant.

    Args:
      config: rate, warm-up and shape.
      num_rounds: rounds of the whole run.
      steps_per_round: global steps in each.
    """
    peak = config.learning_rate
    warmup = round(config.warmup_rounds * steps_per_round)
    total = num_rounds * steps_per_round
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, max(1, total - warmup))
    if warmup == 0:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1)), after],
        [warmup],
    )
