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
from hsee_jax.engine.common import RoundFn, data_layout, layout
from hsee_jax.engine.loop import looped
from hsee_jax.engine.scan import scanned
from hsee_jax.federation import Strategy
from hsee_jax.plan import RoundPlan

__all__ = [
    "RoundFn",
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


def check_finite(plan: RoundPlan, metrics: ExitMetrics, *, round: int) -> None:
    """Refuses a round in which a loss was not finite.

    Raises:
      DivergenceError: naming a client and a branch that saw it, the lowest cut first
        (at a shared server all later turns of the round see it too); ``round`` is
        from 1.
    """
    for name, branch in metrics._asdict().items():
        for n in np.flatnonzero(~np.isfinite(branch.loss_sum))[:1]:
            raise DivergenceError(int(plan.ids[n]), name, round)
