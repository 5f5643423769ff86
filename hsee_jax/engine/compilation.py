"""Compile the rounds of a strategy for the devices at hand.

`make_round` compiles a round in one of three forms, equal up to rounding. ``loop``
calls one compiled turn for each client and batch: on a CPU stacked convolutions, and
convolutions inside a scan, are many times slower. ``vmap`` and ``map`` are one program
that loops over the steps, with the clients spread over the devices. In each step of
``vmap`` a device runs its clients of one cut at once, in ``map`` one after another:
convolutions stay single, memory for the work of one client is enough, and clients
without samples in the step are skipped; the last two do not hold where clients wait for
a server that takes all of them together.
"""

import numpy as np
from jax.sharding import Mesh

from hsee_jax.core.errors import DivergenceError
from hsee_jax.core.types import ExitMetrics, Key
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.engine.loop import make_loop_round
from hsee_jax.engine.plan import RoundPlan
from hsee_jax.engine.round import Programs, RoundFn, all_finite, client_axis
from hsee_jax.engine.scan import make_scan_round
from hsee_jax.federation.strategy import Strategy
from hsee_jax.parallel.mesh import backend_of


def make_round(
    strategy: Strategy,
    pipeline: InputPipeline,
    key: Key,
    *,
    axis: str = "auto",
    mesh: Mesh | None = None,
    programs: Programs | None = None,
    threads: int = 0,
) -> RoundFn:
    """Compile the rounds of a strategy, once for each cut.

    Args:
      strategy: an algorithm.
      pipeline: makes batches of samples.
      key: the root of the augmentation's randomness.
      axis: ``"loop"``, ``"vmap"``, ``"map"`` or ``"auto"``. The second and the third
        are one here: `Federation.one_by_one` of the strategy chooses between them.
      mesh: the mesh of the strategy's federation; ``loop`` does not use it.
      programs: compiled turns of other rounds with the same algorithm, network and
        arguments, to use and to add to; only ``loop`` uses them.
      threads: the number of turns that ``loop`` takes at the same time; 0 for one for
        each core, at most 8. Results do not depend on it.
    """
    if client_axis(axis, backend_of(mesh)) == "loop":
        return make_loop_round(strategy, pipeline, key, programs, threads)
    return make_scan_round(strategy, pipeline, key, mesh)


def check_finite(
    plan: RoundPlan, metrics: ExitMetrics, *, number: int, stop: bool = False
) -> None:
    """Refuse a round in which no client took all of its steps.

    Args:
      plan: the plan of the round.
      metrics: the metrics of the round.
      number: the number of the round, from 1.
      stop: also refuse the round if a single client did not take all of its steps.

    Raises:
      DivergenceError: the round is refused; the error names the first client, by cut,
        with a loss that is not finite, and its branch; exits come before servers.
    """
    some = metrics.exit.count > 0
    if not stop and all_finite(metrics)[some].any():
        return
    for name in ("exit", "server"):
        losses = getattr(metrics, name).loss_sum
        for n in np.flatnonzero(~np.isfinite(losses))[:1]:
            raise DivergenceError(int(plan.ids[n]), name, number)
