"""Whole rounds of a small federation, as the engine trains them."""

import jax
import numpy as np
from tiny import PIPELINE, tiny_data

from hsee_jax.engine import make_round
from hsee_jax.engine.host_store import HostStore
from hsee_jax.engine.plan import num_slots, plan_round
from hsee_jax.engine.store import DeviceStore
from hsee_jax.federation.state import RunState
from hsee_jax.federation.strategy import server_of
from hsee_jax.parallel.mesh import SAME, place_blocks, to_devices

KEY = jax.random.key(3)


def train(
    strategy,
    federation,
    shards,
    *,
    axis,
    rounds=2,
    participation=1.0,
    uniform=False,
    few=False,
    missing=None,
    pipeline=PIPELINE,
    peak=0.05,
    threads=0,
):
    """Train on noise; return the state, and (plan, rates, metrics) of each round.

    With ``few`` the state waits on the host, and slots are for those who take part;
    ``missing`` are the clients that miss a round, by its number.
    """
    mesh, draw = federation.mesh, {"seed": 11, "participation": participation}
    slots = num_slots(
        federation.groups,
        participation=participation if few else 1.0,
        seed=11,
        rounds=rounds,
        multiple=mesh.size if mesh else 1,
    )
    store = (HostStore if few else DeviceStore)(federation, strategy, slots)
    data = to_devices(tiny_data(), mesh, SAME)
    if mesh and strategy.step:
        data = place_blocks(tiny_data(), mesh)
    run = make_round(strategy, pipeline, KEY, axis=axis, mesh=mesh, threads=threads)
    state, log = store.init(KEY), []
    for number in range(rounds):
        plan = plan_round(
            federation.groups,
            shards,
            batch_size=4,
            turn=strategy.turn_unit,
            number=number,
            slots=slots,
            missing=(missing or {}).get(number, ()),
            one_draw=strategy.junction is not None,
            **draw,
        )
        rates = np.linspace(peak, 0.4 * peak, len(plan.indices), dtype=np.float32)
        weights = [
            float(active and (uniform or len(shards[i])))
            for i, active in zip(plan.ids, plan.active, strict=True)
        ]
        some, means, progress = run(
            store.take(state, plan.ids),
            data,
            plan,
            rates,
            np.array(weights, np.float32),
        )
        state = store.put(state, plan.ids, some, means)
        assert progress.finished
        log.append((plan, rates, progress.metrics))
    return store.to_checkpoint(state), log


def branches(federation, strategy, state: RunState):
    """Return the client and the server branch of every client id, as numpy."""
    found = {}
    for g, group in enumerate(federation.groups):
        for m, i in enumerate(group.ids):
            client = jax.tree.map(lambda a, m=m: a[m], state.clients[g])
            server = server_of(strategy, state, g, m)
            found[i] = jax.tree.map(np.asarray, (client, server))
    return found


def assert_same(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)
