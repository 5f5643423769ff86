"""The steps of a round on the host: turn by turn, or those of all clients at once."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from hsee_jax.core.types import Array, Batch, Dataset, ExitMetrics, Key
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.engine.plan import RoundPlan
from hsee_jax.engine.programs import compile_together, restack, unstack
from hsee_jax.engine.round import Floats, Programs, step_key, turn_sequence
from hsee_jax.federation.branch import Branch
from hsee_jax.federation.state import RunState, positions, split_stacks
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

    def late(self) -> tuple[int, ...]:
        """Return the slots of clients that were to take part and did not in time."""


class Inputs(NamedTuple):
    """What stays the same in a round; rows and turns are those of the plan."""

    data: Dataset
    plan: RoundPlan
    rates: Floats  # [T]
    first: int  # the round's first step, counted over the whole run
    sizes: list[int]  # of each stack


Begin = Callable[[Inputs], Steps]


def by_turns(
    strategy: Strategy, pipeline: InputPipeline, key: Key, programs: Programs
) -> Begin:
    """Compile a turn, and make steps that take the turns of all clients one by one."""

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
        assert strategy.turn is not None
        batch = pipeline.training(step_key(key, who, step), data, *rows, who)
        return strategy.turn(client, server, batch, rate, group=group)

    new: set[Callable] = set()

    def turn_of(group: int) -> Callable:
        kind = strategy.turn_kinds[group] if strategy.turn_kinds else group
        if kind not in programs:
            programs[kind] = jax.jit(partial(turn, group=group), donate_argnums=(0, 1))
            new.add(programs[kind])
        return programs[kind]

    return partial(Turns, strategy, turn_of, new)


class Turns:
    """Takes steps turn by turn, with every client and every server by itself.

    Attributes:
      clients: the client in each slot, once a state is loaded.
    """

    def __init__(
        self,
        strategy: Strategy,
        turn_of: Callable[[int], Callable],
        new: set[Any],
        inputs: Inputs,
    ) -> None:
        """Prepare a round.

        Args:
          strategy: the algorithm.
          turn_of: returns what takes a turn of a group's client: a function of the
            client, its server, the data, its rows and their mask, its id, the step in
            the run and the learning rate.
          new: the functions that have yet to be compiled; the round takes them out.
          inputs: of the round.
        """
        self._strategy, self._new, self._inputs = strategy, new, inputs
        self._turn_of: list[Any] = [
            turn_of(group) for group in positions(inputs.sizes)[0]
        ]
        sequence = turn_sequence(strategy, inputs.plan.order)
        self._sequence = list(zip(*sequence, strict=True))

    def load(self, state: RunState) -> None:
        """See `Steps`."""
        self._state, sizes = state, self._inputs.sizes
        if self._strategy.shared:
            self.clients = unstack(state.clients, sizes)
            self._servers = list(state.servers)
        else:
            pairs = unstack(zip(state.clients, state.servers, strict=True), sizes)
            self.clients = [client for client, _ in pairs]
            self._servers = [server for _, server in pairs]
        self._compile()

    def store(self) -> RunState:
        """See `Steps`."""
        state, sizes = self._state, self._inputs.sizes
        if self._strategy.shared:
            stacks = restack(state.clients, sizes, self.clients)
            return state.replace(clients=tuple(stacks), servers=tuple(self._servers))
        pairs = restack(
            zip(state.clients, state.servers, strict=True),
            sizes,
            zip(self.clients, self._servers, strict=True),
        )
        clients, servers = zip(*pairs, strict=True)
        return state.replace(clients=clients, servers=servers)

    def take(self, t: int) -> Log:
        """See `Steps`."""
        inputs, log = self._inputs, []
        plan, turns = inputs.plan, inputs.plan.order.shape[1]
        for step, n in self._sequence[t * turns : (t + 1) * turns]:
            if not plan.mask[step, n].any():
                continue
            s = 0 if self._strategy.shared else n
            self.clients[n], self._servers[s], metrics = self._turn_of[n](
                *self._arguments(step, n)
            )
            log.append((n, metrics))
        return log

    def late(self) -> tuple[int, ...]:
        """See `Steps`; every client of a simulation is in time."""
        return ()

    def _arguments(self, step: int, n: int) -> tuple[Any, ...]:
        """Return what the turn of slot ``n`` takes."""
        inputs, plan = self._inputs, self._inputs.plan
        return (
            self.clients[n],
            self._servers[0 if self._strategy.shared else n],
            inputs.data,
            (plan.indices[step, n], plan.mask[step, n]),
            plan.ids[n],
            np.int32(inputs.first + step),
            inputs.rates[step],
        )

    def _compile(self) -> None:
        """Compile the turns of all groups at once, before the first is taken."""
        active = np.flatnonzero(self._inputs.plan.active).tolist()
        slots = {self._turn_of[n]: n for n in active if self._turn_of[n] in self._new}
        self._new.difference_update(slots)
        compile_together(
            turn.lower(*self._arguments(0, n)) for turn, n in slots.items()
        )


def all_at_once(strategy: Strategy, pipeline: InputPipeline, key: Key) -> Begin:
    """Compile a step of all clients for a strategy without turns."""

    def fetch_batch(
        who: Array, step: Array, data: Dataset, rows: Array, mask: Array
    ) -> Batch:
        return pipeline.training(step_key(key, who, step), data, rows, mask, who)

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

    def __init__(self, step: Callable, inputs: Inputs) -> None:
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

    def late(self) -> tuple[int, ...]:
        """See `Steps`; every client of a simulation is in time."""
        return ()
