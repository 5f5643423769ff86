"""A round lowered from shapes alone, for devices that need not be there."""

from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered

from hsee_jax.core.types import Dataset
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.engine.plan import RoundPlan
from hsee_jax.engine.round import data_layout, make_no_means, nothing_done
from hsee_jax.engine.scan import program
from hsee_jax.engine.scan_arguments import Placement
from hsee_jax.federation.state import RunState
from hsee_jax.federation.strategy import Strategy
from hsee_jax.parallel.mesh import SAME, shapes_on


def lower_round(
    strategy: Strategy,
    pipeline: InputPipeline,
    *,
    mesh: Mesh | None,
    state: RunState,
    data: Dataset,
    plan: RoundPlan,
) -> Lowered:
    """Lower the program of a round (``vmap`` or ``map``) without data or devices.

    ``lower_round(...).compile()`` gives the program that `make_round` runs, with its
    memory, its cost and its text. The devices of the mesh may be those of a topology,
    see `jax.experimental.topologies`.

    Args:
      strategy: an algorithm.
      pipeline: makes batches of samples.
      mesh: the mesh of the strategy's federation; None for the default device.
      state: the clients in the plan's slots, as shapes with shardings, see
        `DeviceStore.checkpoint_shapes`.
      data: the training samples: arrays, or anything else with a shape and a dtype.
        Where `data_layout` spreads them over the mesh, they are one device's block.
      plan: T steps of N slots, of which only the shapes count.
    """
    spread = mesh is not None and data_layout(strategy) != SAME
    blocks = mesh.size if mesh is not None and spread else 1
    samples = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((blocks * a.shape[0], *a.shape[1:]), a.dtype),
        data,
    )
    put, zeros = partial(shapes_on, mesh), make_no_means(strategy, mesh)
    placement = Placement(put, lambda *args: put(jax.eval_shape(zeros, *args), SAME))
    num_steps, num_slots = len(plan.order), len(plan.ids)
    carry, groups, same = placement.arguments(
        strategy,
        state,
        plan,
        np.zeros(num_steps, np.float32),
        np.zeros(num_slots, np.float32),
        nothing_done(plan).metrics,
    )
    return program(strategy, pipeline, mesh).lower(
        carry,
        jax.eval_shape(jax.random.key, 0),
        put(samples, data_layout(strategy)),
        groups,
        same,
        (np.int32(0), np.int32(num_steps)),
    )
