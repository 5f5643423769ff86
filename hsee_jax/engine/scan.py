"""A round as one program that loops over steps, with clients stacked over devices."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.stages import Wrapped

from hsee_jax.core.reuse import reused
from hsee_jax.core.types import Array, Batch, Dataset, ExitMetrics, Key
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.engine.plan import RoundPlan
from hsee_jax.engine.round import (
    Floats,
    RoundFn,
    RoundProgress,
    all_finite,
    check_plan,
    client_batch,
    data_layout,
    due_after,
    layout,
    make_no_means,
    nothing_done,
    turn_of,
)
from hsee_jax.engine.scan_arguments import Carry, GroupPlan, Inputs, Placement
from hsee_jax.federation.aggregation import newest
from hsee_jax.federation.state import (
    Means,
    RunState,
    positions,
    put_member,
    split_stacks,
    stack_sizes,
    take_member,
)
from hsee_jax.federation.strategy import Strategy, average_layers
from hsee_jax.link.codecs import carry_bytes
from hsee_jax.parallel.mesh import (
    CLIENTS,
    SAME,
    constrain,
    over_clients,
    to_devices,
    to_host,
)

_SEGMENT = 32  # steps between two calls of `stop`

AdvanceFn = Callable[[Inputs, Any, Carry], Carry]


def make_scan_round(
    strategy: Strategy, pipeline: InputPipeline, key: Key, mesh: Mesh | None
) -> RoundFn:
    """Compile the program, see `hsee_jax.engine.make_round`."""
    run = program(strategy, pipeline, mesh)
    blocks = 1 if mesh is None or data_layout(strategy) == SAME else mesh.size
    placement = Placement(
        lambda tree, specs: to_devices(tree, mesh, specs), make_no_means(strategy, mesh)
    )

    def run_and_fetch(
        state: RunState,
        data: Dataset,
        plan: RoundPlan,
        learning_rates: Floats,
        weights: Floats,
        begun: RoundProgress | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> tuple[RunState, Means, RoundProgress]:
        check_plan(plan, len(data.labels) // blocks, learning_rates)
        num_steps = len(plan.order)
        progress = begun or nothing_done(plan)
        done = progress.steps
        carry, groups, same = placement.arguments(
            strategy, state, plan, learning_rates, weights, progress.metrics
        )
        while done < num_steps:
            begin, done = done, num_steps if stop is None else done + _SEGMENT
            done = min(done, num_steps)
            steps = np.int32(begin), np.int32(done)
            carry = run(carry, key, data, groups, same, steps)
            if stop is not None and done < num_steps:
                jax.block_until_ready(carry.totals)
                if stop():
                    break
        parts = to_host(carry.totals)
        totals = jax.tree.map(lambda *part: np.concatenate(part), *parts)
        return carry.state, carry.means, RoundProgress(done, done == num_steps, totals)

    return run_and_fetch


@reused
def program(strategy: Strategy, pipeline: InputPipeline, mesh: Mesh | None) -> Wrapped:
    """Compile some steps of a round, and the average after the last step."""
    each: Any = layout(strategy).clients
    pipeline = pipeline._replace(copies=strategy.copies)
    if strategy.step is not None:
        step = _all_at_once(strategy, pipeline, mesh)
    else:
        step = _one_turn(strategy, pipeline, mesh)

    @partial(jax.jit, donate_argnums=0)
    def run(
        carry: Carry,
        key: Key,
        data: Dataset,
        groups: tuple[GroupPlan, ...],
        same: tuple[Array, Array],
        steps: tuple[Array, Array],
    ) -> Carry:
        order, learning_rates = same
        num_steps = len(order)
        turns = 1 if strategy.step is not None else order.shape[1]
        first = carry.state.round * num_steps
        inputs = Inputs(data, groups, order, learning_rates, first, key)
        begin, end = steps
        carry = jax.lax.fori_loop(
            begin * turns, end * turns, partial(step, inputs), carry
        )
        finished = end == num_steps
        due = due_after(strategy, "rounds", carry.state.round + 1)
        due = due if due is False else due & finished
        carry = _average_if(strategy, mesh, due, carry, groups)
        rounds = carry.state.round + finished.astype(jnp.int32)
        return Carry(
            # Else XLA for GPU gathers all clients on each device at an average.
            constrain(carry.state.replace(round=rounds), mesh, layout(strategy)),
            constrain(carry.means, mesh, SAME),
            constrain(carry.totals, mesh, each),
        )

    return run


def _average_if(
    strategy: Strategy,
    mesh: Mesh | None,
    due: Array | bool,
    carry: Carry,
    groups: tuple[GroupPlan, ...],
) -> Carry:
    """Average if it is due, without the clients that refused a step."""

    def average(carry: Carry) -> Carry:
        weights = tuple(
            jnp.where(all_finite(own), group.weights, 0.0)
            for own, group in zip(carry.totals, groups, strict=True)
        )
        state, means = average_layers(strategy, carry.state, weights)
        state = constrain(state, mesh, layout(strategy))
        return Carry(state, newest(carry.means, means), carry.totals)

    if due is False:
        return carry
    return jax.lax.cond(due, average, lambda carry: carry, carry)


def _all_at_once(
    strategy: Strategy, pipeline: InputPipeline, mesh: Mesh | None
) -> AdvanceFn:
    """Make a step of all clients."""
    fetch = over_clients(
        partial(client_batch, pipeline), mesh, (None, 0, None, None, 0, 0), block=3
    )

    def step(inputs: Inputs, t: Array, carry: Carry) -> Carry:
        number = inputs.first + t
        batches = tuple(
            fetch(inputs.key, g.ids, number, inputs.data, g.indices[t], g.mask[t])
            for g in inputs.groups
        )
        assert strategy.step is not None
        state, metrics = strategy.step(
            carry.state, batches, inputs.order[t], inputs.learning_rates[t]
        )
        totals = tuple(map(_added, carry.totals, metrics))
        due = due_after(strategy, "steps", number + 1)
        carry = Carry(state, carry.means, totals)
        return _average_if(strategy, mesh, due, carry, inputs.groups)

    return step


def _one_turn(
    strategy: Strategy, pipeline: InputPipeline, mesh: Mesh | None
) -> AdvanceFn:
    """Make a turn of one client, for a strategy whose turns wait for each other."""

    def step(inputs: Inputs, k: Array, carry: Carry) -> Carry:
        sizes, num_turns = stack_sizes(carry.state), inputs.order.shape[1]
        t, n = turn_of(strategy, inputs.order, k)
        batch = client_batch(
            pipeline,
            inputs.key,
            jnp.concatenate([g.ids for g in inputs.groups])[n],
            inputs.first + t,
            inputs.data,
            jnp.concatenate([g.indices[t] for g in inputs.groups])[n],
            jnp.concatenate([g.mask[t] for g in inputs.groups])[n],
        )
        # The key of a second copy of the samples has no rows to spread.
        rows = constrain(batch._replace(key=None), mesh, PartitionSpec(CLIENTS))
        batch = rows._replace(key=batch.key)
        turns = [_on_group(strategy, g) for g in range(len(sizes))]
        group_of, member_of = map(jnp.asarray, positions(sizes))
        state, metrics = jax.lax.switch(
            group_of[n],
            turns,
            carry.state,
            member_of[n],
            batch,
            inputs.learning_rates[t],
        )
        by_slot = jax.tree.map(
            lambda a: jnp.zeros((sum(sizes), *a.shape), a.dtype).at[n].set(a), metrics
        )
        totals = tuple(map(_added, carry.totals, split_stacks(by_slot, sizes)))
        steps, turns_left = jnp.divmod(k + 1, num_turns)
        due = due_after(strategy, "steps", inputs.first + steps)
        due = due if due is False else due & (turns_left == 0)
        carry = Carry(state, carry.means, totals)
        return _average_if(strategy, mesh, due, carry, inputs.groups)

    return step


def _added(totals: ExitMetrics, metrics: ExitMetrics) -> ExitMetrics:
    """Add the figures of a step to those of the steps before."""
    added = jax.tree.map(jnp.add, totals, metrics)
    return added._replace(link=carry_bytes(added.link))


def _on_group(strategy: Strategy, g: int) -> Callable:
    """Make the turn of a group's member on the whole state."""
    s = 0 if strategy.shared else g

    def turn(
        state: RunState, member: Array, batch: Batch, rate: Array
    ) -> tuple[RunState, ExitMetrics]:
        clients, servers = list(state.clients), list(state.servers)
        client, server = take_member(clients[g], member), servers[s]
        if not strategy.shared:
            server = take_member(server, member)
        assert strategy.turn is not None
        client, server, metrics = strategy.turn(client, server, batch, rate, group=g)
        if not strategy.shared:
            server = put_member(servers[s], member, server)
        clients[g], servers[s] = put_member(clients[g], member, client), server
        state = state.replace(clients=tuple(clients), servers=tuple(servers))
        return state, metrics

    return turn
