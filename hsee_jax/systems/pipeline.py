"""A client made of several devices in a row, which pass micro-batches on.

After CollaPipe (arXiv:2509.19855): the layers of one client are spread over K ordered
devices, and a batch goes through them as M micro-batches. With ``alpha`` seconds per
micro-batch and ``beta`` seconds per batch in each stage, a stage takes
``alpha + beta / M`` for a micro-batch, and the batch
``sum_k (alpha_k + beta_k / M) + (M - 1) max_k (alpha_k + beta_k / M)``.
The split of the layers by dynamic programming is ours.
"""

import math
from typing import NamedTuple

import numpy as np

from hsee_jax.systems.quantities import Bools, Floats


class Stages(NamedTuple):
    """The layers of each device, and the seconds of a batch."""

    ends: tuple[int, ...]  # device k holds the layers ends[k-1]+1 .. ends[k]
    seconds: float


def pipeline_s(alpha: Floats, beta: Floats, micro_batches: int) -> float:
    """Return the seconds of a batch in a pipeline of K stages.

    Args:
      alpha: seconds per micro-batch in each stage, whatever its size, ``[K]``.
      beta: seconds per batch in each stage, ``[K]``.
      micro_batches: M, into which the batch is divided.
    """
    stages = alpha + beta / micro_batches
    return float(stages.sum() + (micro_batches - 1) * stages.max())


def ideal_micro_batches(alpha: Floats, beta: Floats) -> float:
    """Return the best M as a real number, while one stage stays the slowest.

    It is ``sqrt((sum beta - beta_max) / alpha_max)``, where the slowest stage has
    ``alpha_max`` and ``beta_max``. It is infinite if ``alpha_max`` is 0.
    """
    slowest = int(np.argmax(beta))
    if alpha[slowest] == 0:
        return math.inf
    return math.sqrt((beta.sum() - beta[slowest]) / alpha[slowest])


def best_micro_batches(alpha: Floats, beta: Floats, *, most: int) -> int:
    """Return the best M from 1 to ``most``, by trying each."""
    return min(range(1, most + 1), key=lambda m: pipeline_s(alpha, beta, m))


def split_layers(
    layer_s: Floats,
    send_s: Floats,
    *,
    micro_batches: int = 1,
    fits: Bools | None = None,
) -> Stages | None:
    """Spread L layers over K ordered devices so that a batch takes least time.

    The slowest stage counts ``M - 1`` times more than the others. For each possible
    time of the slowest stage, dynamic programming finds the least sum of all stages.

    Args:
      layer_s: seconds of a micro-batch in each layer on each device, ``[K, L]``.
      send_s: seconds in which each device passes on a micro-batch's output of each
        layer, ``[K, L]``; a device without layers passes on what it receives, and
        the devices from layer L on send nothing.
      micro_batches: M.
      fits: whether device k can hold the layers a+1..b, ``[K, L+1, L+1]`` at
        ``[k, a, b]``; None if every device can hold all layers.

    Returns:
      The split; None if the layers fit in no way.
    """
    stages = _stage_seconds(layer_s, send_s)
    if fits is not None:
        stages = np.where(fits, stages, np.inf)
    best: Stages | None = None
    for slowest in np.unique(stages[np.isfinite(stages)]):
        found = _least_sum(np.where(stages <= slowest, stages, np.inf))
        if math.isfinite(found.seconds):
            seconds = found.seconds + (micro_batches - 1) * float(slowest)
            if best is None or seconds < best.seconds:
                best = Stages(found.ends, seconds)
    return best


def _stage_seconds(layer_s: Floats, send_s: Floats) -> Floats:
    """Return the seconds of device k with the layers a+1..b, or none: ``[k, a, b]``."""
    devices, layers = layer_s.shape
    sums = np.concatenate([np.zeros((devices, 1)), layer_s.cumsum(axis=1)], axis=1)
    sends = np.concatenate(
        [np.zeros((devices, 1)), send_s[:, :-1], np.zeros((devices, 1))], axis=1
    )
    first, last = np.indices((layers + 1, layers + 1))
    seconds = sums[:, None, :] - sums[:, :, None] + sends[:, None, :]
    return np.where(first <= last, seconds, np.inf)


def _least_sum(stages: Floats) -> Stages:
    """Return the split with the least sum; its seconds are infinite if there is none.

    Args:
      stages: the seconds of device k with the layers a+1..b, ``[K, L+1, L+1]``.
    """
    devices, count = stages.shape[:2]
    sums = np.full(count, np.inf)
    sums[0] = 0.0
    starts = np.zeros((devices, count), int)
    for k in range(devices):
        through = sums[:, None] + stages[k]  # [a, b]
        starts[k], sums = through.argmin(axis=0), through.min(axis=0)
    ends = [count - 1]
    for k in range(devices - 1, 0, -1):
        ends.append(int(starts[k, ends[-1]]))
    return Stages(tuple(reversed(ends)), float(sums[-1]))
