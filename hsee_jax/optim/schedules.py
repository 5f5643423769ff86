"""The learning rate as a function of the global step: a warm-up, then a schedule."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import optax

from hsee_jax.core.errors import UserError
from hsee_jax.core.registry import Registry

Floats = npt.NDArray[np.float32]
RatesFn = Callable[[npt.ArrayLike], Floats]

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
) -> RatesFn:
    """Build the learning rate of each global step.

    Args:
      name: the schedule after the warm-up, a name in `SCHEDULES`.
      learning_rate: the peak.
      warmup_steps: W; the rate rises linearly from peak / W to the peak.
      total_steps: the steps of the whole run, including the warm-up.
      options: the options of the schedule, by name.

    Returns:
      A function from steps, counted from 0, to their rates, ``float32 [...]``.

    Raises:
      UserError: there is no such schedule. The function raises it for rates that are
        not finite, and for a schedule that JAX cannot trace.
    """
    steps = total_steps - warmup_steps
    after = SCHEDULES.make(name, learning_rate, steps, options=options)

    def rates(counts: npt.ArrayLike) -> Floats:
        counts = np.asarray(counts, np.float32)
        left = counts - np.float32(warmup_steps)
        later = _computed(name, after, left.reshape(-1)).reshape(counts.shape)
        return np.where(left < 0, _rise(counts, learning_rate, warmup_steps), later)

    return rates


def _computed(name: str, schedule: optax.Schedule, steps: Floats) -> Floats:
    """Compute a schedule ``float32 [N]`` at steps; those below 0 do not count."""
    try:
        found: Any = jax.jit(jax.vmap(schedule))(steps)
    except jax.errors.JAXTypeError as error:
        raise UserError(
            f"schedule: {name} is not a function of JAX of one number; allowed are "
            "functions of optax and jax.numpy"
        ) from error
    rates = np.asarray(found, np.float32)
    if rates.shape != steps.shape:
        raise UserError(f"schedule: {name} does not give one rate for a step")
    bad = ~np.isfinite(rates) & (steps >= 0)
    if bad.any():
        raise UserError(
            f"schedule: {name} gives the rate {rates[bad][0]} at step "
            f"{steps[bad][0]:.0f}; allowed are finite rates"
        )
    return rates


def _rise(counts: Floats, peak: float, steps: int) -> Floats:
    """Rise from ``peak / steps`` at 0 to the peak at ``steps - 1``, on the host."""
    low, last = peak / max(1, steps), np.float32(max(1, steps - 1))
    left = np.float32(1) - np.clip(counts, 0, last) * (np.float32(1) / last)
    return np.float32(low - peak) * left + np.float32(peak)
