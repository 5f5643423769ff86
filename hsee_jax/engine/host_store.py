"""The state of many clients in host memory, for rounds with few of them.

A round works on a copy of the rows of its clients, so time and device memory depend
only on the number of these. The other clients miss the means of the layers that they
hold: the store keeps the last means once and gives them to a client when it next takes
part, and to all clients in a checkpoint.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct
from jax.sharding import SingleDeviceSharding

from hsee_jax.core.types import Key, PyTree
from hsee_jax.engine.plan import EMPTY
from hsee_jax.engine.round import layout
from hsee_jax.engine.store import Ids, state_shardings
from hsee_jax.federation.aggregation import newest
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.state import Means, RunState, split_stacks
from hsee_jax.federation.strategy import Strategy
from hsee_jax.parallel.mesh import to_devices, to_host


def _host() -> jax.Device:
    """Return a device in host memory, or any device if JAX is set to use no CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


class HostState(struct.PyTreeNode):
    """The state of all clients on the host; the store changes its arrays in place."""

    rows: RunState  # numpy, leaves of the stacks [G, ...]
    means: Means  # the last mean of every averaged layer
    since: tuple[Ids, ...]  # [G] for each group: the round of each client's row

    @property
    def round(self) -> Any:
        """Return the number of finished rounds, ``int32 []``."""
        return self.rows.round


class HostStore:
    """Keeps all clients on the host, and puts the clients of a round on the devices."""

    def __init__(
        self, federation: Federation, strategy: Strategy, slots: Sequence[int]
    ) -> None:
        """Prepare the store.

        Args:
          federation: the clients, and the mesh for the clients of a round.
          strategy: the algorithm, which makes the state.
          slots: the slots of each group's stack in a round.
        """
        self._members = [np.asarray(group.ids) for group in federation.groups]
        self._slots = tuple(slots)
        self._shared = strategy.shared
        self._mesh, self._layout = federation.mesh, layout(strategy)
        where = state_shardings(federation, strategy)
        self._draw = strategy.init
        self._init = jax.jit(strategy.init, out_shardings=where)
        self._receive = jax.jit(strategy.receive, out_shardings=where)
        self._newest = jax.jit(newest)

    def init(self, key: Key) -> HostState:
        """See `Store`."""
        host = None
        for ids in self.chunks():
            some = self._init(key, split_stacks(ids, self._slots))
            host = self.put(host or self._room(some), ids, some, {})
        assert host is not None
        return host

    def chunks(self) -> Iterator[Ids]:
        """See `Store`."""
        pairs = list(zip(self._members, self._slots, strict=True))
        for number in range(max(-(-len(ids) // slots) for ids, slots in pairs)):
            seats = []
            for ids, slots in pairs:
                some = ids[number * slots : (number + 1) * slots]
                empty = (0, slots - len(some))
                seats.append(np.pad(some, empty, constant_values=EMPTY))
            yield np.concatenate(seats).astype(np.int32)

    def take(self, state: HostState, ids: Ids) -> RunState:
        """See `Store`."""
        seats = split_stacks(ids, self._slots)
        rows = list(map(self._rows, self._members, seats))

        def copies(stacks: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
            return tuple(
                jax.tree.map(lambda leaf, r=r: leaf[r], stack)
                for stack, r in zip(stacks, rows, strict=True)
            )

        some = state.rows.replace(clients=copies(state.rows.clients))
        if not self._shared:
            some = some.replace(servers=copies(state.rows.servers))
        some = to_devices(some, self._mesh, self._layout)
        if state.means:
            since = tuple(s[r] for s, r in zip(state.since, rows, strict=True))
            some = self._receive(some, state.means, since)
        return some

    def put(
        self,
        state: HostState,
        ids: Ids,
        some: RunState,
        means: Means,
        *,
        midway: bool = False,
    ) -> HostState:
        """See `Store`."""
        some, seats = to_host(some), split_stacks(ids, self._slots)
        for g, seated in enumerate(seats):
            here = seated != EMPTY
            to = self._rows(self._members[g], seated[here])

            def write(all_rows: Any, new: Any, to: Ids = to, here: Any = here) -> None:
                all_rows[to] = new[here]

            jax.tree.map(write, state.rows.clients[g], some.clients[g])
            if not self._shared:
                jax.tree.map(write, state.rows.servers[g], some.servers[g])
            # Midway the rows hold means with the number of the round in progress, also
            # when they are put again for a checkpoint.
            number = some.round + midway
            state.since[g][to] = np.maximum(state.since[g][to], number)
        servers = some.servers if self._shared else state.rows.servers
        if means and state.means:
            means = self._newest(state.means, means)
        return HostState(
            state.rows.replace(round=some.round, servers=servers),
            means or state.means,
            state.since,
        )

    def to_checkpoint(self, state: HostState) -> RunState:
        """See `Store`; this writes the missed means into the rows of ``state``."""
        if state.means:
            for ids in self.chunks():
                state = self.put(state, ids, self.take(state, ids), {})
        return state.rows

    def from_checkpoint(self, state: RunState) -> HostState:
        """See `Store`."""
        rows = jax.tree.map(np.array, state)
        since = tuple(np.full(len(m), rows.round, np.int32) for m in self._members)
        return HostState(rows, {}, since)

    def checkpoint_shapes(self) -> RunState:
        """See `Store`."""
        shapes = jax.eval_shape(self._draw, jax.random.key(0), tuple(self._members))
        host = SingleDeviceSharding(_host())
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host),
            shapes,
        )

    def _room(self, some: RunState) -> HostState:
        """Make rows of zeros for all clients, in the shapes of some clients."""

        def stacks(branches: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
            return tuple(
                jax.tree.map(
                    lambda leaf, m=m: np.zeros((len(m), *leaf.shape[1:]), leaf.dtype),
                    branch,
                )
                for m, branch in zip(self._members, branches, strict=True)
            )

        servers = some.servers if self._shared else stacks(some.servers)
        rows = RunState(to_host(some.round), stacks(some.clients), servers)
        since = tuple(np.zeros(len(m), np.int32) for m in self._members)
        return HostState(rows, {}, since)

    @staticmethod
    def _rows(members: Ids, ids: Ids) -> Ids:
        """Return the rows of ids in a group, and the first row for empty slots."""
        rows = np.searchsorted(members, np.where(ids == EMPTY, members[0], ids))
        return rows.astype(np.int32)
