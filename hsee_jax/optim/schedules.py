"""The learning rate as a function of the global step: a warm-up, then a schedule."""

from collections.abc import Mapping
from typing import Any

import optax

from hsee_jax.core.registry import Registry

# Factories take the peak rate and the number of steps after the warm-up.
SCHEDULES: Registry[optax.Schedule] = Registry("schedule")
register = SCHEDULES.register


@SCHEDULES.register(summary="falls to 0 along a cosine")
def cosine(peak: float, steps: int) -> optax.Schedule:
    """Fall from the peak to 0 over the steps."""
    return optax.cosine_decay_schedule(peak, max(1, steps))


@SCHEDULES.register(summary="stays at the peak")
def constant(peak: float, steps: int) -> optax.Schedule:
    """Stay at the peak."""
    return optax.constant_schedule(peak)


def make_schedule(
    name: str,
    *,
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    options: Mapping[str, Any] = {},
) -> optax.Schedule:
    """Build the learning rate of each global step.

    Args:
      name: the schedule after the warm-up, a name in `SCHEDULES`.
      learning_rate: the peak.
      warmup_steps: W; the rate rises linearly from peak / W to the peak.
      total_steps: the steps of the whole run, including the warm-up.
      options: the options of the schedule, by name.
    """
    steps = total_steps - warmup_steps
    after = SCHEDULES.make(name, learning_rate, steps, options=options)
    if warmup_steps == 0:
        return after
    rise = optax.linear_schedule(
        learning_rate / warmup_steps, learning_rate, max(1, warmup_steps - 1)
    )
    return optax.join_schedules([rise, after], [warmup_steps])
