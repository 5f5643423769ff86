"""Stores that keep the clients' state between rounds.

A `DeviceStore` keeps all clients on the devices, each in its own slot. A `HostStore`
(see `hsee_jax.engine.host_store`) keeps many clients in host memory.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
import numpy.typing as npt

from hsee_jax.core.types import Key, PyTree
from hsee_jax.engine.plan import take_seats
from hsee_jax.engine.round import layout
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.state import Means, RunState, split_stacks
from hsee_jax.federation.strategy import Strategy
from hsee_jax.parallel.mesh import shardings

Ids = npt.NDArray[np.int32]  # [N]: the client in each slot of a round, or EMPTY


class Store(Protocol):
    """Keeps the state of all clients, and hands out the state of some of them."""

    def init(self, key: Key) -> Any:
        """Draw the state before the first round from a typed key."""

    def chunks(self) -> Iterator[Ids]:
        """Yield ids in the slots of a round, until every client has come once."""

    def take(self, state: Any, ids: Ids) -> RunState:
        """Return the state of some clients, for a round or an evaluation."""

    def put(
        self,
        state: Any,
        ids: Ids,
        some: RunState,
        means: Means,
        *,
        midway: bool = False,
    ) -> Any:
        """Return the state after a round; the call may reuse the memory of ``state``.

        Args:
          state: the state before the round.
          ids: the client in each slot of the round, or `EMPTY`.
          some: the state of these clients after the round.
          means: the means that the round sent to all clients, see `Strategy.aggregate`.
          midway: whether the round has not ended yet.
        """

    def to_checkpoint(self, state: Any) -> RunState:
        """Return the state as a checkpoint holds it, with a slot for each client."""

    def from_checkpoint(self, state: RunState) -> Any:
        """Return the state from the form of a checkpoint; invert `to_checkpoint`."""

    def checkpoint_shapes(self) -> RunState:
        """Return shapes, dtypes and shardings of the result of `to_checkpoint`."""


class DeviceStore:
    """Keeps all clients on the devices, each in its own slot."""

    def __init__(
        self, federation: Federation, strategy: Strategy, slots: Sequence[int]
    ) -> None:
        """Prepare the store.

        Args:
          federation: the clients, and the mesh of their devices.
          strategy: the algorithm, which makes the state.
          slots: the slots of each group's stack; at least one for each member, except
            where the store only tells shapes.
        """
        self._ids = take_seats(federation.groups, slots, set())
        self._slots = tuple(slots)
        where = state_shardings(federation, strategy)
        self._init = jax.jit(strategy.init, out_shardings=where)

    def init(self, key: Key) -> RunState:
        """See `Store`."""
        return self._init(key, split_stacks(self._ids, self._slots))

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

    def to_checkpoint(self, state: RunState) -> RunState:
        """See `Store`."""
        return state

    def from_checkpoint(self, state: RunState) -> RunState:
        """See `Store`."""
        return state

    def checkpoint_shapes(self) -> RunState:
        """See `Store`."""
        ids = split_stacks(self._ids, self._slots)
        return self._init.eval_shape(jax.random.key(0), ids)


def state_shardings(federation: Federation, strategy: Strategy) -> PyTree | None:
    """Return the shardings of the state of clients in slots; None without a mesh."""
    mesh = federation.mesh
    if mesh is None:
        return None
    return shardings(mesh, layout(strategy))
