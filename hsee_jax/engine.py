"""Rounds: a strategy applied to a federation's data, on the devices that are there.

`make_round` compiles a round in one of two forms, equal up to rounding. ``loop`` calls
one compiled turn for each client and batch: on a CPU stacked convolutions, and
convolutions inside a scan, are many times slower. ``vmap`` is one program: a scan over
the steps, in each of which the clients of one cut run at once, spread over the devices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, PartitionSpec

from hsee_jax.aggregate import latest
from hsee_jax.augment import InputPipeline
from hsee_jax.base import Array, Batch, Dataset, DivergenceError, ExitMetrics, Key
from hsee_jax.federation import (
    Means,
    RunState,
    Strategy,
    positions,
    put_member,
    split,
    take_member,
)
from hsee_jax.mesh import CLIENTS, SAME, SPREAD, constrain, fetch, over_clients, place
from hsee_jax.plan import RoundPlan
from hsee_jax.split import Branch

Floats = npt.NDArray[np.float32]


class RoundFn(Protocol):
    """A compiled round."""

    def __call__(
        self,
        state: RunState,
        data: Dataset,
        plan: RoundPlan,
        learning_rates: Floats,
        weights: Floats,
    ) -> tuple[RunState, Means, ExitMetrics]:
        """Trains a round.

        Args:
          state: of the clients in the plan's slots, before; its buffers are given up.
          data: the training samples, on the device; over several devices a block for
            each, in which the plan's indices count.
          plan: T steps of N slots.
          learning_rates: ``float32 [T]``.
          weights: ``float32 [N]``, of each slot in the averages; 0 for the absent.

        Returns:
          The state after, the last means of what is averaged, if it was, and the
          metrics of the whole round, numpy arrays ``[N]``.
        """


def client_axis(choice: str) -> str:
    """``loop`` or ``vmap``: what ``auto`` means here."""
    if choice != "auto":
        return choice
    one_cpu = jax.default_backend() == "cpu" and jax.process_count() == 1
    return "loop" if one_cpu else "vmap"


def layout(strategy: Strategy) -> RunState:
    """How a strategy's state lies over a mesh, as a prefix tree of partition specs.

    Where clients wait for each other there is nothing to spread but the rows of a
    batch, so every device holds all of them.
    """
    clients = SAME if strategy.step is None else SPREAD
    servers = SAME if strategy.shared else SPREAD
    return RunState(SAME, clients, servers)  # type: ignore[arg-type]


def data_layout(strategy: Strategy) -> PartitionSpec:
    """How the training samples lie over a mesh: a block for each device, or all."""
    return SAME if strategy.step is None else SPREAD


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
        return _looped(strategy, pipeline, key)
    return _scanned(strategy, pipeline, key, mesh)


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


def _looped(strategy: Strategy, pipeline: InputPipeline, key: Key) -> RoundFn:
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
        batch = pipeline.training(_step_key(key, who, step), data, *rows)
        return strategy.turn(client, server, batch, rate, group=group)

    aggregate = jax.jit(strategy.aggregate, donate_argnums=0)
    newest = jax.jit(latest)

    def run(
        state: RunState,
        data: Dataset,
        plan: RoundPlan,
        learning_rates: Floats,
        weights: Floats,
    ) -> tuple[RunState, Means, ExitMetrics]:
        sizes = _sizes(state)
        group_of, _ = positions(sizes)
        round, first = int(state.round), int(state.round) * len(learning_rates)
        means: Means = {}
        log: list[tuple[int, ExitMetrics]] = []
        state = jax.device_put(state)
        clients, servers = _unstack(strategy, state)

        def averaged(state: RunState, means: Means) -> tuple[RunState, Means]:
            state = _stack(strategy, state, clients, servers)
            state, new = aggregate(state, split(weights, sizes))
            return state, newest(means, new) if means else new

        for k, (t, n) in enumerate(zip(*_sequence(strategy, plan.order), strict=True)):
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
            last = (k + 1) % plan.order.shape[1] == 0  # of the step
            if last and _due(strategy, "steps", first + t + 1):
                state, means = averaged(state, means)
                clients, servers = _unstack(strategy, state)
        if _due(strategy, "rounds", round + 1):
            state, means = averaged(state, means)
        else:
            state = _stack(strategy, state, clients, servers)
        totals = jax.tree.map(
            lambda *sums: np.bincount([n for n, _ in log], sums, len(plan.ids)),
            *jax.device_get([metrics for _, metrics in log]),
        )
        return state.replace(round=state.round + 1), means, totals

    return run


def _scanned(
    strategy: Strategy, pipeline: InputPipeline, key: Key, mesh: Mesh | None
) -> RoundFn:
    Carry = tuple[RunState, Means]

    def fetch_batch(
        key: Key, who: Array, step: Array, data: Dataset, rows: Array, mask: Array
    ) -> Batch:
        return pipeline.training(_step_key(key, who, step), data, rows, mask)

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
        sizes = _sizes(state)

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
            due = _due(strategy, "steps", first + t + 1)
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
            steps, slots = _sequence(strategy, order)
            state, metrics = jax.lax.scan(one_turn, state, (steps, slots))
            totals = split(
                jax.tree.map(
                    lambda a: jax.ops.segment_sum(a, slots, sum(sizes)), metrics
                ),
                sizes,
            )
            means = none
        due = _due(strategy, "rounds", state.round + 1)
        state, means = average_if(due, (state, means))
        return state.replace(round=state.round + 1), means, totals

    def run_and_fetch(
        state: RunState,
        data: Dataset,
        plan: RoundPlan,
        learning_rates: Floats,
        weights: Floats,
    ) -> tuple[RunState, Means, ExitMetrics]:
        sizes = _sizes(state)
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


class _GroupPlan(NamedTuple):
    """A group's part of a `RoundPlan`, S slots."""

    ids: Any  # int32 [S]
    indices: Any  # int32 [T, S, B]
    mask: Any  # bool [T, S, B]
    weights: Any  # float32 [S]


def _step_key(key: Key, client: Array, step: Array) -> Key:
    return jax.random.fold_in(jax.random.fold_in(key, client), step)


def _sizes(state: RunState) -> list[int]:
    """The slots of each stack of clients."""
    return [len(jax.tree.leaves(stack)[0]) for stack in state.clients]


def _sequence(strategy: Strategy, order: Any) -> tuple[Any, Any]:
    """Step and slot of each turn in a round, from the turns ``int32 [T, A]``."""
    numbers = jnp if isinstance(order, jax.Array) else np
    num_steps, num_turns = order.shape
    steps = numbers.arange(num_steps)
    if strategy.turn_unit == "epoch":
        return numbers.tile(steps, num_turns), numbers.repeat(order[0], num_steps)
    return numbers.repeat(steps, num_turns), order.reshape(-1)


def _due(strategy: Strategy, unit: str, count: Any) -> Any:
    """Whether to aggregate after ``count`` steps or rounds."""
    if strategy.period == 0 or strategy.period_unit != unit:
        return False
    return count % strategy.period == 0


# Compiled calls for a whole member: one by one its many leaves take longer.
_take = jax.jit(take_member)
_put = jax.jit(put_member, donate_argnums=0)


def _unstack(strategy: Strategy, state: RunState) -> tuple[list[Branch], list[Branch]]:
    """Every slot's branch by itself, and its server's, or the one shared server."""

    def members(stacks: tuple[Branch, ...]) -> list[Branch]:
        return [
            _take(stack, np.int32(m))
            for stack, size in zip(stacks, _sizes(state), strict=True)
            for m in range(size)
        ]

    servers = list(state.servers) if strategy.shared else members(state.servers)
    return members(state.clients), servers


def _stack(
    strategy: Strategy, state: RunState, clients: list[Branch], servers: list[Branch]
) -> RunState:
    """The inverse of `_unstack`, in the buffers of ``state``."""
    sizes = _sizes(state)

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
