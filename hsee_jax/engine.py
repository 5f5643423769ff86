"""Rounds: a strategy applied to a federation's data, on the device that is there.

`make_round` compiles a round in one of two forms, equal up to rounding. ``loop`` calls
one compiled turn for each client and batch: on a CPU stacked convolutions, and
convolutions inside a scan, are many times slower. ``vmap`` is one program: a scan over
the steps, in each of which the clients of one cut run at once.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from hsee_jax.augment import augment, normalize
from hsee_jax.base import Array, Batch, Dataset, DivergenceError, ExitMetrics, Key
from hsee_jax.plan import RoundPlan
from hsee_jax.split import Branch
from hsee_jax.strategies import (
    Group,
    RunState,
    Strategy,
    positions,
    put_member,
    take_member,
)

Floats = npt.NDArray[np.float32]


class InputPipeline(NamedTuple):
    """From stored samples to the batch of a step."""

    mean: tuple[float, ...]  # of each channel, scale 0..1
    std: tuple[float, ...]
    augment: str  # see `hsee_jax.augment.augment`

    def training(self, key: Key, data: Dataset, indices: Array, mask: Array) -> Batch:
        """The samples at ``int32 [B]``, normalised and augmented."""
        batch = self.evaluation(data, indices, mask)
        return batch._replace(inputs=augment(key, batch.inputs, self.augment))

    def evaluation(self, data: Dataset, indices: Array, mask: Array) -> Batch:
        """The samples at ``int32 [B]``, normalised."""
        images = normalize(data.images[indices], self.mean, self.std)
        return Batch(images, data.labels[indices], mask)


class RoundFn(Protocol):
    """A compiled round."""

    def __call__(
        self,
        state: RunState,
        data: Dataset,
        plan: RoundPlan,
        learning_rates: Floats,
        weights: Floats,
    ) -> tuple[RunState, ExitMetrics]:
        """Trains a round.

        Args:
          state: before; its buffers are given up.
          data: the training samples, on the device.
          plan: T steps of N clients.
          learning_rates: ``float32 [T]``.
          weights: ``float32 [N]``, of each client in the averages; 0 for the absent.

        Returns:
          The state after, and the metrics of the whole round, leaves ``[N]``.
        """


def client_axis(choice: str) -> str:
    """``loop`` or ``vmap``: what ``auto`` means on this backend."""
    if choice != "auto":
        return choice
    return "loop" if jax.default_backend() == "cpu" else "vmap"


def make_round(
    strategy: Strategy,
    groups: Sequence[Group],
    pipeline: InputPipeline,
    key: Key,
    *,
    axis: str = "auto",
) -> RoundFn:
    """Compiles the rounds of a strategy, once for each cut.

    Args:
      strategy: made for the same groups.
      groups: the clients.
      pipeline: how samples become batches.
      key: root of the augmentation's randomness.
      axis: ``"loop"``, ``"vmap"`` or ``"auto"``.
    """
    make = _looped if client_axis(axis) == "loop" else _scanned
    return make(strategy, tuple(groups), pipeline, key)


def check_finite(groups: Sequence[Group], metrics: ExitMetrics, *, round: int) -> None:
    """Refuses a round in which a loss was not finite.

    Raises:
      DivergenceError: naming a client and a branch that saw it, the lowest cut first
        (at a shared server all later turns of the round see it too); ``round`` is
        from 1.
    """
    ids = [i for group in groups for i in group.ids]
    for name, branch in metrics._asdict().items():
        for n in np.flatnonzero(~np.isfinite(branch.loss_sum))[:1]:
            raise DivergenceError(ids[n], name, round)


def _looped(
    strategy: Strategy, groups: tuple[Group, ...], pipeline: InputPipeline, key: Key
) -> RoundFn:
    group_of = np.asarray(positions(groups)[0])
    ids = np.array([i for group in groups for i in group.ids], np.int32)
    num_clients = len(ids)

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

    def run(
        state: RunState,
        data: Dataset,
        plan: RoundPlan,
        learning_rates: Floats,
        weights: Floats,
    ) -> tuple[RunState, ExitMetrics]:
        round, log = int(state.round), []
        first = round * len(learning_rates)
        clients, servers = _unstack(strategy, state)
        for k, (t, n) in enumerate(zip(*_sequence(strategy, plan), strict=True)):
            if plan.mask[t, n].any():
                s = 0 if strategy.shared else n
                clients[n], servers[s], metrics = turn(
                    clients[n],
                    servers[s],
                    data,
                    (plan.indices[t, n], plan.mask[t, n]),
                    ids[n],
                    np.int32(first + t),
                    learning_rates[t],
                    group=int(group_of[n]),
                )
                log.append((n, metrics))
            if (k + 1) % num_clients == 0 and _due(strategy, "steps", first + t + 1):
                state = _stack(strategy, groups, state, clients, servers)
                state = aggregate(state, _split(weights, groups))
                clients, servers = _unstack(strategy, state)
        state = _stack(strategy, groups, state, clients, servers)
        if _due(strategy, "rounds", round + 1):
            state = aggregate(state, _split(weights, groups))
        totals = jax.tree.map(
            lambda *sums: np.bincount([n for n, _ in log], sums, num_clients),
            *jax.device_get([metrics for _, metrics in log]),
        )
        return state.replace(round=state.round + 1), totals

    return run


def _scanned(
    strategy: Strategy, groups: tuple[Group, ...], pipeline: InputPipeline, key: Key
) -> RoundFn:
    group_of, member_of = positions(groups)
    ids = jnp.array([i for group in groups for i in group.ids], jnp.int32)

    def aggregate_if(due: Array | bool, state: RunState, weights: Array) -> RunState:
        by_group = _split(weights, groups)
        return jax.lax.cond(
            due, lambda s: strategy.aggregate(s, by_group), lambda s: s, state
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
        data: Dataset,
        plan: RoundPlan,
        learning_rates: Array,
        weights: Array,
    ) -> tuple[RunState, ExitMetrics]:
        first = state.round * len(learning_rates)

        def all_at_once(state: RunState, t: Array) -> tuple[RunState, ExitMetrics]:
            keys = jax.vmap(lambda i: _step_key(key, i, first + t))(ids)
            batch = jax.vmap(pipeline.training, (0, None, 0, 0))(
                keys, data, plan.indices[t], plan.mask[t]
            )
            assert strategy.step is not None
            state, metrics = strategy.step(
                state, _split(batch, groups), plan.order[t], learning_rates[t]
            )
            due = _due(strategy, "steps", first + t + 1)
            return aggregate_if(due, state, weights), metrics

        def one_turn(
            state: RunState, turn: tuple[Array, Array]
        ) -> tuple[RunState, ExitMetrics]:
            t, n = turn
            batch = pipeline.training(
                _step_key(key, ids[n], first + t),
                data,
                plan.indices[t, n],
                plan.mask[t, n],
            )
            turns = [on_group(g) for g in range(len(groups))]
            return jax.lax.switch(
                group_of[n], turns, state, member_of[n], batch, learning_rates[t]
            )

        if strategy.step is not None:
            state, metrics = jax.lax.scan(
                all_at_once, state, jnp.arange(len(learning_rates))
            )
            totals = jax.tree.map(lambda a: jnp.sum(a, axis=0), metrics)
        else:
            steps, clients = _sequence(strategy, plan)
            state, metrics = jax.lax.scan(one_turn, state, (steps, clients))
            totals = jax.tree.map(
                lambda a: jax.ops.segment_sum(a, clients, len(ids)), metrics
            )
        due = _due(strategy, "rounds", state.round + 1)
        state = aggregate_if(due, state, weights)
        return state.replace(round=state.round + 1), totals

    def run_and_fetch(
        state: RunState,
        data: Dataset,
        plan: RoundPlan,
        learning_rates: Floats,
        weights: Floats,
    ) -> tuple[RunState, ExitMetrics]:
        state, totals = run(state, data, plan, learning_rates, weights)
        return state, jax.device_get(totals)

    return run_and_fetch


def _step_key(key: Key, client: Array, step: Array) -> Key:
    return jax.random.fold_in(jax.random.fold_in(key, client), step)


def _sequence(strategy: Strategy, plan: RoundPlan) -> tuple[Any, Any]:
    """Step and client of each turn in a round, ``int32 [T N]`` each."""
    num_steps, num_clients = plan.order.shape
    if strategy.turn_unit == "epoch":
        numbers = jnp if isinstance(plan.order, jax.Array) else np
        return (
            numbers.tile(numbers.arange(num_steps), num_clients),
            numbers.repeat(plan.order[0], num_steps),
        )
    return np.repeat(np.arange(num_steps), num_clients), plan.order.reshape(-1)


def _due(strategy: Strategy, unit: str, count: Any) -> Any:
    """Whether to aggregate after ``count`` steps or rounds."""
    if strategy.period == 0 or strategy.period_unit != unit:
        return False
    return count % strategy.period == 0


def _split(tree: Any, groups: Sequence[Group]) -> tuple[Any, ...]:
    """Leaves ``[N, ...]`` cut into one tree a group, leaves ``[G, ...]``."""
    ends = np.cumsum([len(group.ids) for group in groups])
    return tuple(
        jax.tree.map(lambda a, i=i, j=j: a[i:j], tree)
        for i, j in zip([0, *ends[:-1]], ends, strict=True)
    )


def _unstack(strategy: Strategy, state: RunState) -> tuple[list[Branch], list[Branch]]:
    """Every client's branch by itself, and its server's, or the one shared server."""

    def members(stack: Branch) -> list[Branch]:
        rows = jax.tree.map(np.asarray, stack)
        return [
            jax.tree.map(lambda a, m=m: jnp.array(a[m]), rows)
            for m in range(len(jax.tree.leaves(rows)[0]))
        ]

    clients = [branch for stack in state.clients for branch in members(stack)]
    if strategy.shared:
        return clients, list(state.servers)
    return clients, [branch for stack in state.servers for branch in members(stack)]


def _stack(
    strategy: Strategy,
    groups: Sequence[Group],
    state: RunState,
    clients: list[Branch],
    servers: list[Branch],
) -> RunState:
    """The inverse of `_unstack`."""

    def stacks(branches: list[Branch]) -> tuple[Branch, ...]:
        rows = iter(branches)
        return tuple(
            jax.tree.map(
                lambda *leaves: jnp.asarray(np.stack(leaves)),
                *[next(rows) for _ in group.ids],
            )
            for group in groups
        )

    return state.replace(
        clients=stacks(clients),
        servers=tuple(servers) if strategy.shared else stacks(servers),
    )
