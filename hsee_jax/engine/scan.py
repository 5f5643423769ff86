"""A round as one program: a scan over its steps, clients stacked over devices."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hsee_jax.aggregate import latest
from hsee_jax.augment import InputPipeline
from hsee_jax.base import Array, Batch, Dataset, ExitMetrics, Key, Metrics
from hsee_jax.engine.common import (
    Floats,
    Progress,
    RoundFn,
    all_finite,
    check_indices,
    data_layout,
    due_after,
    layout,
    nothing_done,
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

_DTYPES: Any = Metrics(np.float32, np.int32, np.int32)  # type: ignore[arg-type]
_SEGMENT = 32  # steps between two looks at whether to stop


class _Carry(NamedTuple):
    """What changes in a round."""

    state: RunState
    means: Means
    totals: tuple[ExitMetrics, ...]  # one a group, leaves [S]


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

    each: Any = layout(strategy).clients
    sharding = None if mesh is None else NamedSharding(mesh, SAME)
    blocks = 1 if mesh is None or data_layout(strategy) == SAME else mesh.size

    @partial(jax.jit, out_shardings=sharding)
    def no_means(state: RunState, weights: tuple[Array, ...]) -> Means:
        return jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(strategy.aggregate, state, weights)[1],
        )

    @partial(jax.jit, donate_argnums=0)
    def run(
        carry: _Carry,
        key: Key,
        data: Dataset,
        plan: tuple[_GroupPlan, ...],
        same: tuple[Array, Array],
        steps: tuple[Array, Array],
    ) -> _Carry:
        order, learning_rates = same
        num_steps, num_turns = order.shape
        first = carry.state.round * num_steps
        sizes = sizes_of(carry.state)

        def average_if(due: Array | bool, carry: _Carry) -> _Carry:
            def average(carry: _Carry) -> _Carry:
                weights = tuple(
                    jnp.where(all_finite(own), group.weights, 0.0)
                    for own, group in zip(carry.totals, plan, strict=True)
                )
                state, means = strategy.aggregate(carry.state, weights)
                return _Carry(state, latest(carry.means, means), carry.totals)

            if due is False:
                return carry
            return jax.lax.cond(due, average, lambda carry: carry, carry)

        def all_at_once(t: Array, carry: _Carry) -> _Carry:
            batches = tuple(
                fetch_batches(key, g.ids, first + t, data, g.indices[t], g.mask[t])
                for g in plan
            )
            assert strategy.step is not None
            state, metrics = strategy.step(
                carry.state, batches, order[t], learning_rates[t]
            )
            totals = jax.tree.map(jnp.add, carry.totals, metrics)
            due = due_after(strategy, "steps", first + t + 1)
            return average_if(due, _Carry(state, carry.means, totals))

        def one_turn(k: Array, carry: _Carry) -> _Carry:
            t, n = (turns[k] for turns in sequence(strategy, order))
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
            state, metrics = jax.lax.switch(
                group_of[n], turns, carry.state, member_of[n], batch, learning_rates[t]
            )
            by_slot = jax.tree.map(
                lambda a: jnp.zeros(sum(sizes), a.dtype).at[n].set(a), metrics
            )
            totals = jax.tree.map(jnp.add, carry.totals, split(by_slot, sizes))
            steps, turns_left = jnp.divmod(k + 1, num_turns)
            due = due_after(strategy, "steps", first + steps)
            due = due if due is False else due & (turns_left == 0)
            return average_if(due, _Carry(state, carry.means, totals))

        begin, end = steps
        if strategy.step is not None:
            carry = jax.lax.fori_loop(begin, end, all_at_once, carry)
        else:
            carry = jax.lax.fori_loop(
                begin * num_turns, end * num_turns, one_turn, carry
            )
        finished = end == num_steps
        due = due_after(strategy, "rounds", carry.state.round + 1)
        carry = average_if(due if due is False else due & finished, carry)
        rounds = carry.state.round + finished.astype(jnp.int32)
        return _Carry(
            carry.state.replace(round=rounds),
            constrain(carry.means, mesh, SAME),
            constrain(carry.totals, mesh, each),
        )

    def run_and_fetch(
        state: RunState,
        data: Dataset,
        plan: RoundPlan,
        learning_rates: Floats,
        weights: Floats,
        begun: Progress | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> tuple[RunState, Means, Progress]:
        check_indices(plan, len(data.labels) // blocks)
        sizes = sizes_of(state)
        step, _, before = begun or nothing_done(plan)
        groups = map(
            _GroupPlan,
            split(plan.ids, sizes),
            split(plan.indices, sizes, axis=1),
            split(plan.mask, sizes, axis=1),
            split(weights, sizes),
        )
        by_step = PartitionSpec(None, *each)
        specs = (_GroupPlan(each, by_step, by_step, each),) * len(sizes)
        placed = place(tuple(groups), mesh, specs)
        same = place((plan.order, learning_rates), mesh, SAME)
        sums = jax.tree.map(np.asarray, before, ExitMetrics(_DTYPES, _DTYPES))
        carry = _Carry(
            state,
            no_means(state, tuple(group.weights for group in placed)),
            place(split(sums, sizes), mesh, each),
        )
        num_steps = len(plan.order)
        while step < num_steps:
            begin, step = step, num_steps if stop is None else step + _SEGMENT
            step = min(step, num_steps)
            carry = run(
                carry, key, data, placed, same, (np.int32(begin), np.int32(step))
            )
            if stop is not None and step < num_steps:
                jax.block_until_ready(carry.totals)
                if stop():
                    break
        totals = jax.tree.map(
            lambda *parts: np.concatenate(parts), *fetch(carry.totals)
        )
        return carry.state, carry.means, Progress(step, step == num_steps, totals)

    return run_and_fetch
