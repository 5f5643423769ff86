"""Where the clients' state is between rounds.

`DeviceStore`: on the devices, where all clients have a slot of their own. `HostStore`:
where few of many take part in a round, the rows of all clients wait in host memory. A
round works on a copy of the rows of those who take part; time and device memory depend
on them alone. What the others have missed, the means of the layers that they hold, is
kept once, and given to each of them when it next takes part, or to all by `settle`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
import numpy.typing as npt
from flax import struct
from jax.sharding import NamedSharding, SingleDeviceSharding

from hsee_jax.aggregate import latest
from hsee_jax.base import Key, PyTree
from hsee_jax.engine import layout
from hsee_jax.federation import Federation, Means, RunState, Strategy, split
from hsee_jax.mesh import fetch, place
from hsee_jax.plan import EMPTY, take_seats

Ids = npt.NDArray[np.int32]  # [N]: the client in each slot of a round, or EMPTY


class Store(Protocol):
    """Keeps the state of all clients, and hands out that of some."""

    def init(self, key: Key) -> Any:
        """The state before the first round, from a typed key."""

    def chunks(self) -> Iterator[Ids]:
        """All clients once, as what sits in the slots of one round after another."""

    def take(self, state: Any, ids: Ids) -> RunState:
        """The state of some clients, for a round or to be evaluated."""

    def put(
        self,
        state: Any,
        ids: Ids,
        some: RunState,
        means: Means,
        *,
        midway: bool = False,
    ) -> Any:
        """The state after a round; ``state`` is given up.

        Args:
          state: before the round.
          ids: of the round.
          some: what became of the clients taken.
          means: that were sent to all, see `Strategy.aggregate`.
          midway: the round has not ended.
        """

    def settled(self, state: Any) -> RunState:
        """The state of all clients as a checkpoint holds it, a slot for each."""

    def adopted(self, state: RunState) -> Any:
        """The inverse of `settled`."""

    def like(self) -> RunState:
        """Shapes, dtypes and shardings of what `settled` returns."""


class DeviceStore:
    """All clients on the devices, each in its own slot."""

    def __init__(
        self, federation: Federation, strategy: Strategy, slots: Sequence[int]
    ) -> None:
        """Composes it.

        Args:
          federation: the clients, and the mesh they are spread over.
          strategy: of which the state is.
          slots: in each group's stack; at least one for each member.
        """
        self._ids = take_seats(federation.groups, slots, set())
        self._slots = tuple(slots)
        where = _shardings(federation, strategy)
        self._init = jax.jit(strategy.init, out_shardings=where)

    def init(self, key: Key) -> RunState:
        """See `Store`."""
        return self._init(key, split(self._ids, self._slots))

    def chunks(self) -> Iterator[Ids]:
        """See `Store`."""
        yield self._ids

    def take(self, state: RunState, ids: Ids) -> RunState:
        """See `Store`."""
        return state

    def put(
        self,
        state: RunState,
        ids: Ids,
        some: RunState,
        means: Means,
        *,
        midway: bool = False,
    ) -> RunState:
        """See `Store`."""
        return some

    def settled(self, state: RunState) -> RunState:
        """See `Store`."""
        return state

    def adopted(self, state: RunState) -> RunState:
        """See `Store`."""
        return state

    def like(self) -> RunState:
        """See `Store`."""
        ids = split(self._ids, self._slots)
        return self._init.eval_shape(jax.random.key(0), ids)


def _shardings(federation: Federation, strategy: Strategy) -> PyTree | None:
    """Where the state of clients in slots lies; without a mesh nothing is said."""
    mesh = federation.mesh
    if mesh is None:
        return None
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), layout(strategy))


def _host() -> jax.Device:
    """What keeps its arrays in host memory; JAX may have been told to use no CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


class HostState(struct.PyTreeNode):
    """The state of all clients on the host; its arrays are changed in place."""

    rows: RunState  # numpy, leaves of the stacks [G, ...]
    means: Means  # the last of every layer that was averaged
    since: tuple[Ids, ...]  # [G] a group: the round that each client's row is of

    @property
    def round(self) -> Any:
        """Rounds done, int32 []."""
        return self.rows.round


class HostStore:
    """All clients on the host, and those of a round on the devices."""

    def __init__(
        self, federation: Federation, strategy: Strategy, slots: Sequence[int]
    ) -> None:
        """Composes it.

        Args:
          federation: the clients, and the mesh that those of a round are spread over.
          strategy: of which the state is.
          slots: in each group's stack of a round.
        """
        self._members = [np.asarray(group.ids) for group in federation.groups]
        self._slots = tuple(slots)
        self._shared = strategy.shared
        self._mesh, self._layout = federation.mesh, layout(strategy)
        where = _shardings(federation, strategy)
        self._draw = strategy.init
        self._init = jax.jit(strategy.init, out_shardings=where)
        self._receive = jax.jit(strategy.receive, out_shardings=where)
        self._latest = jax.jit(latest)

    def init(self, key: Key) -> HostState:
        """See `Store`."""
        host = None
        for ids in self.chunks():
            some = self._init(key, split(ids, self._slots))
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
        seats = split(ids, self._slots)
        rows = list(map(self._rows, self._members, seats))

        def copies(stacks: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
            return tuple(
                jax.tree.map(lambda leaf, r=r: leaf[r], stack)
                for stack, r in zip(stacks, rows, strict=True)
            )

        some = state.rows.replace(clients=copies(state.rows.clients))
        if not self._shared:
            some = some.replace(servers=copies(state.rows.servers))
        if self._mesh is not None:
            some = place(some, self._mesh, self._layout)
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
        some, seats = fetch(some), split(ids, self._slots)
        for g, seated in enumerate(seats):
            here = seated != EMPTY
            to = self._rows(self._members[g], seated[here])

            def write(all_rows: Any, new: Any, to: Ids = to, here: Any = here) -> None:
                all_rows[to] = new[here]

            jax.tree.map(write, state.rows.clients[g], some.clients[g])
            if not self._shared:
                jax.tree.map(write, state.rows.servers[g], some.servers[g])
            # They have the means of a round that has not ended, whose number is next.
            state.since[g][to] = some.round + midway
        servers = some.servers if self._shared else state.rows.servers
        if means and state.means:
            means = self._latest(state.means, means)
        return HostState(
            state.rows.replace(round=some.round, servers=servers),
            means or state.means,
            state.since,
        )

    def settled(self, state: HostState) -> RunState:
        """See `Store`; writes into ``state``, which stays what it is."""
        if state.means:
            for ids in self.chunks():
                state = self.put(state, ids, self.take(state, ids), {})
        return state.rows

    def adopted(self, state: RunState) -> HostState:
        """See `Store`."""
        rows = jax.tree.map(np.array, state)
        since = tuple(np.full(len(m), rows.round, np.int32) for m in self._members)
        return HostState(rows, {}, since)

    def like(self) -> RunState:
        """See `Store`."""
        shapes = jax.eval_shape(self._draw, jax.random.key(0), tuple(self._members))
        host = SingleDeviceSharding(_host())
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host),
            shapes,
        )

    def _room(self, some: RunState) -> HostState:
        """Rows for all clients, by the example of some."""

        def stacks(branches: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
            return tuple(
                jax.tree.map(
                    lambda leaf, m=m: np.zeros((len(m), *leaf.shape[1:]), leaf.dtype),
                    branch,
                )
                for m, branch in zip(self._members, branches, strict=True)
            )

        servers = some.servers if self._shared else stacks(some.servers)
        rows = RunState(fetch(some.round), stacks(some.clients), servers)
        since = tuple(np.zeros(len(m), np.int32) for m in self._members)
        return HostState(rows, {}, since)

    @staticmethod
    def _rows(members: Ids, ids: Ids) -> Ids:
        """Where ids are in a group; empty slots read its first row."""
        rows = np.searchsorted(members, np.where(ids == EMPTY, members[0], ids))
        return rows.astype(np.int32)
