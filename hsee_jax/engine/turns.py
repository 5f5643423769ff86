"""The steps of a round on the host: turn by turn, or those of all clients at once."""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from hsee_jax.core.reuse import reused
from hsee_jax.core.trees import row_of
from hsee_jax.core.types import Array, Dataset, ExitMetrics, Key
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.engine.plan import RoundPlan
from hsee_jax.engine.programs import restack, unstack
from hsee_jax.engine.round import Floats, client_batch, turn_of
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
        """Return the slots of clients that were to take part and did not in time.

        Every client of a simulation is in time.
        """
        return ()


class Inputs(NamedTuple):
    """What stays the same in a round; rows and turns are those of the plan."""

    data: Dataset
    plan: RoundPlan
    rates: Floats  # [T]
    first: int  # the round's first step, counted over the whole run
    sizes: list[int]  # of each stack


Begin = Callable[[Inputs], Steps]


class Turns(Steps):
    """Takes steps turn by turn, with every client and every server by itself.

    A subclass says what a turn is, see `start`.

    Attributes:
      clients: the client in each slot, once a state is loaded.
      servers: the server of each slot, or the shared server alone.
    """

    def __init__(self, strategy: Strategy, inputs: Inputs) -> None:
        """Prepare a round."""
        self.inputs, self._strategy = inputs, strategy
        self.groups = positions(inputs.sizes)[0]  # of each slot
        order = inputs.plan.order
        sequence = turn_of(strategy, order, np.arange(order.size))
        self._sequence = list(zip(*sequence, strict=True))

    def load(self, state: RunState) -> None:
        """See `Steps`."""
        self._state, sizes = state, self.inputs.sizes
        if self._strategy.shared:
            self.clients = unstack(state.clients, sizes)
            self.servers = list(state.servers)
        else:
            pairs = unstack(zip(state.clients, state.servers, strict=True), sizes)
            self.clients = [client for client, _ in pairs]
            self.servers = [server for _, server in pairs]

    def store(self) -> RunState:
        """See `Steps`."""
        state, sizes = self._state, self.inputs.sizes
        if self._strategy.shared:
            stacks = restack(state.clients, sizes, self.clients)
            return state.replace(clients=tuple(stacks), servers=tuple(self.servers))
        pairs = restack(
            zip(state.clients, state.servers, strict=True),
            sizes,
            zip(self.clients, self.servers, strict=True),
        )
        clients, servers = zip(*pairs, strict=True)
        return state.replace(clients=clients, servers=servers)

    def take(self, t: int) -> Log:
        """See `Steps`."""
        plan, turns = self.inputs.plan, self.inputs.plan.order.shape[1]
        started = [
            (n, self.start(step, n))
            for step, n in self._sequence[t * turns : (t + 1) * turns]
            if plan.mask[step, n].any()
        ]
        return [(n, turn.result()) for n, turn in started]

    def start(self, step: int, n: int) -> Future[ExitMetrics]:
        """Start the turn of slot ``n``, after the earlier turns with its server."""
        raise NotImplementedError

    def server_of(self, n: int) -> int:
        """Return where in ``servers`` the server of slot ``n`` is."""
        return 0 if self._strategy.shared else n


def all_at_once(strategy: Strategy, pipeline: InputPipeline, key: Key) -> Begin:
    """Compile a step of all clients for a strategy without turns."""
    return partial(_Stacked, partial(_step_of_all(strategy, pipeline), key))


@reused
def _step_of_all(strategy: Strategy, pipeline: InputPipeline) -> Callable:
    fetch = jax.vmap(partial(client_batch, pipeline), (None, 0, None, None, 0, 0))

    @partial(jax.jit, donate_argnums=1)
    def step(
        key: Key,
        state: RunState,
        data: Dataset,
        groups: tuple[tuple[Array, Array, Array], ...],
        order: Array,
        number: Array,
        rate: Array,
    ) -> tuple[RunState, ExitMetrics]:
        assert strategy.step is not None
        batches = tuple(fetch(key, ids, number, data, *rows) for ids, *rows in groups)
        state, metrics = strategy.step(state, batches, order, rate)
        return state, jax.tree.map(lambda *m: jnp.concatenate(m), *metrics)

    return step


class _Stacked(Steps):
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
        return [(n, row_of(metrics, n)) for n in range(len(plan.ids))]
