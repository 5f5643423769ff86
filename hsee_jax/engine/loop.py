"""A round as a loop on the host, with a compiled turn for each client and batch."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from hsee_jax.core.types import Array, Batch, Dataset, ExitMetrics, Key
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.engine.plan import RoundPlan
from hsee_jax.engine.round import (
    Floats,
    Programs,
    RoundFn,
    RoundProgress,
    all_finite,
    check_indices,
    due_after,
    nothing_done,
    step_key,
    turn_sequence,
)
from hsee_jax.federation.aggregation import newest
from hsee_jax.federation.branch import Branch
from hsee_jax.federation.state import (
    Means,
    RunState,
    positions,
    put_member,
    split_stacks,
    stack_sizes,
    take_member,
)
from hsee_jax.federation.strategy import Strategy

Log = list[tuple[int, ExitMetrics]]  # slots, with the metrics of their turns


class Steps(Protocol):
    """Takes the steps of a round, and keeps the state in the form that they need."""

    def load(self, state: RunState) -> None:
        """Take over a state and donate its buffers."""

    def store(self) -> RunState:
        """Return the state."""

    def take(self, t: int) -> Log:
        """Take step ``t`` of the round, counted from 0."""


def make_loop_round(
    strategy: Strategy,
    pipeline: InputPipeline,
    key: Key,
    programs: Programs | None = None,
) -> RoundFn:
    """Compile the loop, see `hsee_jax.engine.make_round`."""
    known = {} if programs is None or not strategy.turn_kinds else programs
    begin = _by_turns(strategy, pipeline, key, known)
    if strategy.turn is None:
        begin = _all_at_once(strategy, pipeline, key)
    aggregate = jax.jit(strategy.aggregate, donate_argnums=0)
    newer = jax.jit(newest)

    def run(
        state: RunState,
        data: Dataset,
        plan: RoundPlan,
        learning_rates: Floats,
        weights: Floats,
        begun: RoundProgress | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> tuple[RunState, Means, RoundProgress]:
        check_indices(plan, len(data.labels))
        sizes, num_steps = stack_sizes(state), len(plan.order)
        number, first = int(state.round), int(state.round) * num_steps
        done, _, totals = begun or nothing_done(plan)
        means: Means = {}
        steps = begin(_Inputs(data, plan, learning_rates, first, sizes))
        steps.load(jax.device_put(state))
        log: Log = []

        def average(state: RunState) -> RunState:
            nonlocal means, totals
            totals = _added(totals, log)
            log.clear()
            counted = np.where(all_finite(totals), weights, np.float32(0))
            state, new = aggregate(state, split_stacks(counted, sizes))
            means = newer(means, new) if means else new
            return state

        while done < num_steps:
            log += steps.take(done)
            done += 1
            if due_after(strategy, "steps", first + done):
                steps.load(average(steps.store()))
            if stop is not None and done < num_steps and stop():
                break
        finished, state = done == num_steps, steps.store()
        if finished and due_after(strategy, "rounds", number + 1):
            state = average(state)
        totals = _added(totals, log)
        state = state.replace(round=state.round + np.int32(finished))
        return state, means, RoundProgress(done, finished, totals)

    return run


class _Inputs(NamedTuple):
    """What stays the same in a round."""

    data: Dataset
    plan: RoundPlan
    rates: Floats  # [T]
    first: int  # the round's first step, counted over the whole run
    sizes: list[int]  # of each stack


Begin = Callable[[_Inputs], Steps]


def _by_turns(
    strategy: Strategy, pipeline: InputPipeline, key: Key, programs: Programs
) -> Begin:
    """Compile a turn, and make steps that take the turns of all clients one by one."""

    def turn(
        group: int,
        client: Branch,
        server: Branch,
        data: Dataset,
        rows: tuple[Array, Array],
        who: Array,
        step: Array,
        rate: Array,
    ) -> tuple[Branch, Branch, ExitMetrics]:
        assert strategy.turn is not None
        batch = pipeline.training(step_key(key, who, step), data, *rows)
        return strategy.turn(client, server, batch, rate, group=group)

    def compiled(group: int) -> Callable:
        kind = strategy.turn_kinds[group] if strategy.turn_kinds else group
        if kind not in programs:
            programs[kind] = jax.jit(partial(turn, group), donate_argnums=(0, 1))
        return programs[kind]

    return partial(_Turns, strategy, compiled)


class _Turns:
    """Takes steps turn by turn, with every client and every server by itself."""

    def __init__(
        self, strategy: Strategy, compiled: Callable[[int], Callable], inputs: _Inputs
    ) -> None:
        self._strategy, self._inputs = strategy, inputs
        self._turn_of = [compiled(group) for group in positions(inputs.sizes)[0]]
        sequence = turn_sequence(strategy, inputs.plan.order)
        self._sequence = list(zip(*sequence, strict=True))

    def load(self, state: RunState) -> None:
        """See `Steps`."""
        self._state = state
        self._clients = self._members(state.clients)
        self._servers = list(state.servers)
        if not self._strategy.shared:
            self._servers = self._members(state.servers)

    def store(self) -> RunState:
        """See `Steps`."""
        servers = tuple(self._servers)
        if not self._strategy.shared:
            servers = self._stacks(self._state.servers, self._servers)
        clients = self._stacks(self._state.clients, self._clients)
        return self._state.replace(clients=clients, servers=servers)

    def take(self, t: int) -> Log:
        """See `Steps`."""
        inputs, log = self._inputs, []
        plan, turns = inputs.plan, inputs.plan.order.shape[1]
        for step, n in self._sequence[t * turns : (t + 1) * turns]:
            if not plan.mask[step, n].any():
                continue
            s = 0 if self._strategy.shared else n
            self._clients[n], self._servers[s], metrics = self._turn_of[n](
                self._clients[n],
                self._servers[s],
                inputs.data,
                (plan.indices[step, n], plan.mask[step, n]),
                plan.ids[n],
                np.int32(inputs.first + step),
                inputs.rates[step],
            )
            log.append((n, metrics))
        return log

    def _members(self, stacks: tuple[Branch, ...]) -> list[Branch]:
        return [
            _take(stack, np.int32(m))
            for stack, size in zip(stacks, self._inputs.sizes, strict=True)
            for m in range(size)
        ]

    def _stacks(
        self, stacks: tuple[Branch, ...], members: list[Branch]
    ) -> tuple[Branch, ...]:
        """Write members into the buffers of their stacks."""
        rows, filled = iter(members), list(stacks)
        for g, size in enumerate(self._inputs.sizes):
            for m in range(size):
                filled[g] = _put(filled[g], np.int32(m), next(rows))
        return tuple(filled)


# A compiled call for a whole member is faster than a call for each of its many leaves.
_take = jax.jit(take_member)
_put = jax.jit(put_member, donate_argnums=0)


def _all_at_once(strategy: Strategy, pipeline: InputPipeline, key: Key) -> Begin:
    """Compile a step of all clients for a strategy without turns."""

    def fetch_batch(
        who: Array, step: Array, data: Dataset, rows: Array, mask: Array
    ) -> Batch:
        return pipeline.training(step_key(key, who, step), data, rows, mask)

    @partial(jax.jit, donate_argnums=0)
    def step(
        state: RunState,
        data: Dataset,
        groups: tuple[tuple[Array, Array, Array], ...],
        order: Array,
        number: Array,
        rate: Array,
    ) -> tuple[RunState, ExitMetrics]:
        assert strategy.step is not None
        fetch = jax.vmap(fetch_batch, (0, None, None, 0, 0))
        batches = tuple(fetch(ids, number, data, *rows) for ids, *rows in groups)
        state, metrics = strategy.step(state, batches, order, rate)
        return state, jax.tree.map(lambda *m: jnp.concatenate(m), *metrics)

    return partial(_Stacked, step)


class _Stacked:
    """Takes the steps of all clients at once, on their stacks."""

    def __init__(self, step: Callable, inputs: _Inputs) -> None:
        self._step, self._inputs = step, inputs

    def load(self, state: RunState) -> None:
        """See `Steps`."""
        self._state = state

    def store(self) -> RunState:
        """See `Steps`."""
        return self._state

    def take(self, t: int) -> Log:
        """See `Steps`."""
        inputs, plan = self._inputs, self._inputs.plan
        rows = (plan.ids, plan.indices[t], plan.mask[t])
        stacks = (split_stacks(row, inputs.sizes) for row in rows)
        groups = tuple(zip(*stacks, strict=True))
        self._state, metrics = self._step(
            self._state,
            inputs.data,
            groups,
            plan.order[t],
            np.int32(inputs.first + t),
            inputs.rates[t],
        )
        slots = range(len(plan.ids))
        return [(n, jax.tree.map(lambda m, n=n: m[n], metrics)) for n in slots]


def _added(totals: ExitMetrics, log: Log) -> ExitMetrics:
    """Add the metrics of turns, in their order, to the sums of their slots."""
    slots = np.array([n for n, _ in log], int)

    def add(total: Any, *values: Any) -> Any:
        total = total.copy()
        if values:
            np.add.at(total, slots, np.stack(values).astype(total.dtype))
        return total

    return jax.tree.map(add, totals, *jax.device_get([metrics for _, metrics in log]))
