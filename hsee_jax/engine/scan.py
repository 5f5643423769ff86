"""A round as one program: a scan over its steps, clients stacked over devices."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from hsee_jax.aggregate import latest
from hsee_jax.augment import InputPipeline
from hsee_jax.base import Array, Batch, Dataset, ExitMetrics, Key
from hsee_jax.engine.common import (
    Floats,
    RoundFn,
    due_after,
    layout,
    sequence,
    sizes_of,
    step_key,
)
from hsee_jax.federation import (
    Means,
    RunState,
    Strategy,
    positions,
    put_member,
    split,
    take_member,
)
from hsee_jax.mesh import CLIENTS, SAME, constrain, fetch, over_clients, place
from hsee_jax.plan import RoundPlan


class _GroupPlan(NamedTuple):
    """A group's part of a `RoundPlan`, S slots."""

    ids: Any  # int32 [S]
    indices: Any  # int32 [T, S, B]
    mask: Any  # bool [T, S, B]
    weights: Any  # float32 [S]


def scanned(
    strategy: Strategy, pipeline: InputPipeline, key: Key, mesh: Mesh | None
) -> RoundFn:
    """See `hsee_jax.engine.make_round`."""
    Carry = tuple[RunState, Means]

    def fetch_batch(
        key: Key, who: Array, step: Array, data: Dataset, rows: Array, mask: Array
    ) -> Batch:
        return pipeline.training(step_key(key, who, step), data, rows, mask)

    fetch_batches = over_clients(
        fetch_batch, mesh, (None, 0, None, None, 0, 0), block=3
    )

    def on_group(g: int) -> Callable:
        s = 0 if strategy.shared else g

        def turn(
            state: RunState, member: Array, batch: Batch, rate: Array
        ) -> tuple[RunState, ExitMetrics]:
            clients, servers = list(state.clients), list(state.servers)
            client, server = take_member(clients[g], member), servers[s]
            if not strategy.shared:
                server = take_member(server, member)
            client, server, metrics = strategy.turn(
                client, server, batch, rate, group=g
            )
            if not strategy.shared:
                server = put_member(servers[s], member, server)
            clients[g], servers[s] = put_member(clients[g], member, client), server
            state = state.replace(clients=tuple(clients), servers=tuple(servers))
            return state, metrics

        return turn

    @partial(jax.jit, donate_argnums=0)
    def run(
        state: RunState,
        key: Key,
        data: Dataset,
        plan: tuple[_GroupPlan, ...],
        same: tuple[Array, Array],
    ) -> tuple[RunState, Means, tuple[ExitMetrics, ...]]:
        order, learning_rates = same
        weights = tuple(g.weights for g in plan)
        first = state.round * len(learning_rates)
        sizes = sizes_of(state)

        def average_if(due: Array | bool, carry: Carry) -> Carry:
            def average(carry: Carry) -> Carry:
                state, means = strategy.aggregate(carry[0], weights)
                return state, latest(carry[1], means)

            if due is False:
                return carry
            return jax.lax.cond(due, average, lambda carry: carry, carry)

        def all_at_once(carry: Carry, t: Array) -> tuple[Carry, Any]:
            batches = tuple(
                fetch_batches(key, g.ids, first + t, data, g.indices[t], g.mask[t])
                for g in plan
            )
            assert strategy.step is not None
            state, metrics = strategy.step(
                carry[0], batches, order[t], learning_rates[t]
            )
            due = due_after(strategy, "steps", first + t + 1)
            return average_if(due, (state, carry[1])), metrics

        def one_turn(
            state: RunState, turn: tuple[Array, Array]
        ) -> tuple[RunState, Any]:
            t, n = turn
            batch = fetch_batch(
                key,
                jnp.concatenate([g.ids for g in plan])[n],
                first + t,
                data,
                jnp.concatenate([g.indices[t] for g in plan])[n],
                jnp.concatenate([g.mask[t] for g in plan])[n],
            )
            batch = constrain(batch, mesh, PartitionSpec(CLIENTS))
            turns = [on_group(g) for g in range(len(plan))]
            group_of, member_of = map(jnp.asarray, positions(sizes))
            return jax.lax.switch(
                group_of[n], turns, state, member_of[n], batch, learning_rates[t]
            )

        none: Means = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(strategy.aggregate, state, weights)[1],
        )
        if strategy.step is not None:
            (state, means), metrics = jax.lax.scan(
                all_at_once, (state, none), jnp.arange(len(learning_rates))
            )
            totals = jax.tree.map(lambda a: jnp.sum(a, axis=0), metrics)
        else:
            steps, slots = sequence(strategy, order)
            state, metrics = jax.lax.scan(one_turn, state, (steps, slots))
            totals = split(
                jax.tree.map(
                    lambda a: jax.ops.segment_sum(a, slots, sum(sizes)), metrics
                ),
                sizes,
            )
            means = none
        due = due_after(strategy, "rounds", state.round + 1)
        state, means = average_if(due, (state, means))
        return state.replace(round=state.round + 1), means, totals

    def run_and_fetch(
        state: RunState,
        data: Dataset,
        plan: RoundPlan,
        learning_rates: Floats,
        weights: Floats,
    ) -> tuple[RunState, Means, ExitMetrics]:
        sizes = sizes_of(state)
        groups = map(
            _GroupPlan,
            split(plan.ids, sizes),
            split(plan.indices, sizes, axis=1),
            split(plan.mask, sizes, axis=1),
            split(weights, sizes),
        )
        each = layout(strategy).clients
        by_step = PartitionSpec(None, *each)
        specs = _GroupPlan(each, by_step, by_step, each)
        state, means, totals = run(
            state,
            key,
            data,
            place(tuple(groups), mesh, (specs,) * len(sizes)),
            place((plan.order, learning_rates), mesh, SAME),
        )
        totals = jax.tree.map(lambda *parts: np.concatenate(parts), *fetch(totals))
        return state, means, totals

    return run_and_fetch
