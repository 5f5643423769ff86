"""Rounds: a strategy applied to a federation's data, on the devices that are there.

`make_round` compiles a round in one of two forms, equal up to rounding. ``loop`` calls
one compiled turn for each client and batch: on a CPU stacked convolutions, and
convolutions inside a scan, are many times slower. ``vmap`` is one program: a scan over
the steps, in each of which the clients of one cut run at once, spread over the devices.
"""

import jax
import numpy as np
from jax.sharding import Mesh

from hsee_jax.augment import InputPipeline
from hsee_jax.base import DivergenceError, ExitMetrics, Key
from hsee_jax.engine.common import (
    Progress,
    RoundFn,
    all_finite,
    data_layout,
    layout,
)
from hsee_jax.engine.loop import looped
from hsee_jax.engine.scan import scanned
from hsee_jax.federation import Strategy
from hsee_jax.plan import RoundPlan

__all__ = [
    "Progress",
    "RoundFn",
    "all_finite",
    "check_finite",
    "client_axis",
    "data_layout",
    "layout",
    "make_round",
]


def client_axis(choice: str) -> str:
    """``loop`` or ``vmap``: what ``auto`` means here."""
    if choice != "auto":
        return choice
    one_cpu = jax.default_backend() == "cpu" and jax.process_count() == 1
    return "loop" if one_cpu else "vmap"


def make_round(
    strategy: Strategy,
    pipeline: InputPipeline,
    key: Key,
    *,
    axis: str = "auto",
    mesh: Mesh | None = None,
) -> RoundFn:
    """Compiles the rounds of a strategy, once for each cut.

    Args:
      strategy: an algorithm.
      pipeline: how samples become batches.
      key: root of the augmentation's randomness.
      axis: ``"loop"``, ``"vmap"`` or ``"auto"``.
      mesh: that of the strategy's federation; ``vmap`` alone takes one.
    """
    if client_axis(axis) == "loop":
        return looped(strategy, pipeline, key)
    return scanned(strategy, pipeline, key, mesh)


def check_finite(
    plan: RoundPlan, metrics: ExitMetrics, *, round: int, stop: bool = False
) -> None:
    """Refuses a round in which no client could take all of its steps.

    Args:
      plan: the round's.
      metrics: of the round.
      round: its number, from 1.
      stop: refuse it already if one client could not.

    Raises:
      DivergenceError: naming a client and a branch of it, the lowest cut first.
    """
    some = metrics.exit.count > 0
    if not stop and all_finite(metrics)[some].any():
        return
    for name, branch in metrics._asdict().items():
        for n in np.flatnonzero(~np.isfinite(branch.loss_sum))[:1]:
            raise DivergenceError(int(plan.ids[n]), name, round)
