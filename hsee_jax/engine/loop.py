"""A round as a loop on the host: one compiled turn for each client and batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from hsee_jax.aggregate import latest
from hsee_jax.augment import InputPipeline
from hsee_jax.base import Array, Dataset, ExitMetrics, Key
from hsee_jax.engine.common import (
    Floats,
    Progress,
    RoundFn,
    all_finite,
    check_indices,
    due_after,
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
from hsee_jax.plan import RoundPlan
from hsee_jax.split import Branch


def looped(strategy: Strategy, pipeline: InputPipeline, key: Key) -> RoundFn:
    """See `hsee_jax.engine.make_round`."""

    @partial(jax.jit, static_argnames="group", donate_argnums=(0, 1))
    def turn(
        client: Branch,
        server: Branch,
        data: Dataset,
        rows: tuple[Array, Array],
        who: Array,
        step: Array,
        rate: Array,
        *,
        group: int,
    ) -> tuple[Branch, Branch, ExitMetrics]:
        batch = pipeline.training(step_key(key, who, step), data, *rows)
        return strategy.turn(client, server, batch, rate, group=group)

    aggregate = jax.jit(strategy.aggregate, donate_argnums=0)
    newest = jax.jit(latest)

    def run(
        state: RunState,
        data: Dataset,
        plan: RoundPlan,
        learning_rates: Floats,
        weights: Floats,
        begun: Progress | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> tuple[RunState, Means, Progress]:
        check_indices(plan, len(data.labels))
        sizes = sizes_of(state)
        group_of, _ = positions(sizes)
        num_steps, num_turns = plan.order.shape
        round, first = int(state.round), int(state.round) * num_steps
        steps, _, totals = begun or nothing_done(plan)
        means: Means = {}
        log: list[tuple[int, ExitMetrics]] = []
        state = jax.device_put(state)
        clients, servers = _unstack(strategy, state)

        def averaged(state: RunState, means: Means) -> tuple[RunState, Means]:
            counted = np.where(all_finite(totals), weights, np.float32(0))
            state = _stack(strategy, state, clients, servers)
            state, new = aggregate(state, split(counted, sizes))
            return state, newest(means, new) if means else new

        turns = list(zip(*sequence(strategy, plan.order), strict=True))
        for k in range(steps * num_turns, len(turns)):
            t, n = turns[k]
            if plan.mask[t, n].any():
                s = 0 if strategy.shared else n
                clients[n], servers[s], metrics = turn(
                    clients[n],
                    servers[s],
                    data,
                    (plan.indices[t, n], plan.mask[t, n]),
                    plan.ids[n],
                    np.int32(first + t),
                    learning_rates[t],
                    group=group_of[n],
                )
                log.append((n, metrics))
            steps, turns_left = divmod(k + 1, num_turns)
            if turns_left:
                continue
            if due_after(strategy, "steps", first + steps):
                totals, log = _added(totals, log), []
                state, means = averaged(state, means)
                clients, servers = _unstack(strategy, state)
            if stop is not None and steps < num_steps and stop():
                break
        totals = _added(totals, log)
        finished = steps == num_steps
        if finished and due_after(strategy, "rounds", round + 1):
            state, means = averaged(state, means)
        else:
            state = _stack(strategy, state, clients, servers)
        state = state.replace(round=state.round + np.int32(finished))
        return state, means, Progress(steps, finished, totals)

    return run


def _added(totals: ExitMetrics, log: list[tuple[int, ExitMetrics]]) -> ExitMetrics:
    """Sums by slot, and what turns measured added to them in their order."""
    slots = np.array([n for n, _ in log], int)

    def add(total: Any, *values: Any) -> Any:
        total = total.copy()
        np.add.at(total, slots, values)
        return total

    return jax.tree.map(add, totals, *jax.device_get([metrics for _, metrics in log]))


# Compiled calls for a whole member: one by one its many leaves take longer.
_take = jax.jit(take_member)
_put = jax.jit(put_member, donate_argnums=0)


def _unstack(strategy: Strategy, state: RunState) -> tuple[list[Branch], list[Branch]]:
    """Every slot's branch by itself, and its server's, or the one shared server."""

    def members(stacks: tuple[Branch, ...]) -> list[Branch]:
        return [
            _take(stack, np.int32(m))
            for stack, size in zip(stacks, sizes_of(state), strict=True)
            for m in range(size)
        ]

    servers = list(state.servers) if strategy.shared else members(state.servers)
    return members(state.clients), servers


def _stack(
    strategy: Strategy, state: RunState, clients: list[Branch], servers: list[Branch]
) -> RunState:
    """The inverse of `_unstack`, in the buffers of ``state``."""
    sizes = sizes_of(state)

    def stacks(stacks: tuple[Branch, ...], branches: list[Branch]) -> tuple[Any, ...]:
        rows, filled = iter(branches), list(stacks)
        for g, size in enumerate(sizes):
            for m in range(size):
                filled[g] = _put(filled[g], np.int32(m), next(rows))
        return tuple(filled)

    new_servers = tuple(servers)
    if not strategy.shared:
        new_servers = stacks(state.servers, servers)
    return state.replace(clients=stacks(state.clients, clients), servers=new_servers)
