"""A run's round, lowered from its configuration alone."""

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered

from hsee_jax.config.schema import Config
from hsee_jax.core.types import Dataset
from hsee_jax.engine.lowering import lower_round
from hsee_jax.engine.plan import plan_round
from hsee_jax.engine.store import DeviceStore
from hsee_jax.runs.build import (
    build_federation,
    build_pipeline,
    build_strategy,
    make_store,
)
from hsee_jax.runs.data import build_info


def lower(config: Config, mesh: Mesh, *, samples: int) -> Lowered:
    """Lower a round of a run as one program, without data or devices.

    Clients are stacked with ``vmap`` unless the configuration names ``map``.

    Its ``compile().memory_analysis()`` tells whether the run fits into the memory of
    its devices.

    Args:
      config: the run.
      mesh: the devices, which may be those of a topology, see `lower_round`.
      samples: the training samples of each client.

    Raises:
      UserError: the configuration does not fit the network or the devices.
    """
    info = build_info(config.data)
    federation = build_federation(config, info, mesh)
    strategy = build_strategy(config, federation)
    slots, _ = make_store(config, federation, strategy)
    ids = [client.id for client in federation.clients]
    count = samples * len(ids)
    plan = plan_round(
        federation.groups,
        dict.fromkeys(ids, np.arange(samples, dtype=np.int32)),
        batch_size=min(config.run.batch_size, samples),
        participation=config.clients.participation,
        turn=strategy.turn_unit,
        seed=config.run.data_seed,
        number=0,
        slots=slots,
        one_draw=strategy.junction is not None,
    )
    return lower_round(
        strategy,
        build_pipeline(config, info),
        mesh=mesh,
        state=DeviceStore(federation, strategy, slots).checkpoint_shapes(),
        data=Dataset(
            jax.ShapeDtypeStruct((count, *info.input_shape), np.dtype(info.dtype)),
            jax.ShapeDtypeStruct((count,), np.int32),
        ),
        plan=plan,
    )
