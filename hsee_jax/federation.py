"""Who trains what: clients in groups of one cut, their state, and what a strategy is.

The clients of a group are stacked on a leading axis. A *member* is a client's position
in its group, a *slot* a position in a stack.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from hsee_jax.aggregate import LayerMean
from hsee_jax.base import Array, Batch, ExitMetrics, Key, PyTree
from hsee_jax.model import Model, Network, init_network
from hsee_jax.split import Branch, BranchSpec, client_spec, server_spec


class Client(NamedTuple):
    """A client: its id, from which its random draws are derived, and its cut."""

    id: int
    cut: int


class Group(NamedTuple):
    """The clients of one cut; a *member* is a position in ``ids``."""

    cut: int
    ids: tuple[int, ...]  # ascending


def group_clients(clients: Iterable[Client]) -> tuple[Group, ...]:
    """Groups by ascending cut, whatever order the clients come in."""
    cuts: dict[int, list[int]] = {}
    for client in clients:
        cuts.setdefault(client.cut, []).append(client.id)
    return tuple(Group(cut, tuple(sorted(cuts[cut]))) for cut in sorted(cuts))


class Federation(NamedTuple):
    """Who trains what.

    The optimizer's updates are scaled by the learning rate and subtracted, as suits
    optax's ``trace`` and ``scale_by_adam``; the updates of its aliases, such as
    ``optax.adam``, have their sign turned already, and would climb.
    """

    model: Model
    groups: tuple[Group, ...]
    optimizer: optax.GradientTransformation
    mesh: Mesh | None = None  # over whose devices stacks of clients are spread
    link: str = "full"  # from clients to servers, see `hsee_jax.link`

    def specs(self, group: int) -> tuple[BranchSpec, BranchSpec]:
        """Of a group's clients, and of the servers behind them."""
        cut = self.groups[group].cut
        return (
            client_spec(self.model, cut, self.optimizer),
            server_spec(self.model, cut, self.optimizer, self.link),
        )


Means = dict[str, LayerMean]  # by the name of the layer


class RunState(struct.PyTreeNode):
    """Everything that training changes.

    The leaves of a stack are ``[S, ...]``, with a slot for each client of the group, or
    for those who take part in a round.
    """

    round: Array  # int32 []: rounds done
    clients: tuple[Branch, ...]  # one stack a group
    servers: tuple[Branch, ...]  # one stack a group; if shared, one plain branch


class TurnFn(Protocol):
    """One client's step, and its server's."""

    def __call__(
        self,
        client: Branch,
        server: Branch,
        batch: Batch,
        learning_rate: Array,
        *,
        group: int,
    ) -> tuple[Branch, Branch, ExitMetrics]:
        """Steps one client of a group.

        Args:
          client: its branch.
          server: the shared server, or the client's replica.
          batch: the client's data, ``[B, ...]``.
          learning_rate: ``float32 []``.
          group: the group's index.
        """


class StepFn(Protocol):
    """One step of all clients at once."""

    def __call__(
        self,
        state: RunState,
        batches: tuple[Batch, ...],
        order: Array,
        learning_rate: Array,
    ) -> tuple[RunState, tuple[ExitMetrics, ...]]:
        """Steps every client that has data; a mask of only false leaves it out.

        Args:
          state: before.
          batches: one a group, leaves ``[S, B, ...]``.
          order: ``int32 [A]``, the turns at a shared server, as positions in the
            concatenation of all stacks; who is not in it is not served.
          learning_rate: ``float32 []``.

        Returns:
          The state, and metrics, one a group, with leaves ``[S]``.
        """


class InitFn(Protocol):
    """The state before the first round."""

    def __call__(self, key: Key, ids: tuple[Array, ...] | None = None) -> RunState:
        """Draws it.

        Args:
          key: a typed key.
          ids: of the client in each slot, ``int32 [S]`` a group; None is all clients.
        """


class Strategy(NamedTuple):
    """An algorithm, as pure functions over `RunState`."""

    init: InitFn
    turn: TurnFn
    step: StepFn | None  # None: turns depend on each other, there is no step of all
    # The means of what is shared, by weights float32 [S] a group, given to all slots.
    aggregate: Callable[[RunState, tuple[Array, ...]], tuple[RunState, Means]]
    # The same for slots whose state is of an earlier round, int32 [S] a group.
    receive: Callable[[RunState, Means, tuple[Array, ...]], RunState]
    # What each client sends for such a mean, a tree a group, leaves [S, ...].
    sent: Callable[[RunState], tuple[PyTree, ...]]
    part: Callable[[Branch, int], Branch]  # a server's layers behind a group's cut
    shared: bool  # one server for all, or one replica each
    turn_unit: str  # "batch": all clients' turns step by step; "epoch": one by one
    period: int  # aggregate after so many ...
    period_unit: str  # ... "rounds" or "steps"; a period of 0 is never
    boundary: str  # "detached" or "joint"; "none": client and server are at one place


def server_of(strategy: Strategy, state: RunState, group: int, member: int) -> Branch:
    """The layers behind a client's cut, and the final head."""
    if strategy.shared:
        return strategy.part(state.servers[0], group)
    return jax.tree.map(lambda leaf: leaf[member], state.servers[group])


def positions(sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Stack and member of each position in the concatenation of stacks."""
    pairs = [(g, m) for g, size in enumerate(sizes) for m in range(size)]
    return [g for g, _ in pairs], [m for _, m in pairs]


def split(tree: PyTree, sizes: Sequence[int], *, axis: int = 0) -> tuple[PyTree, ...]:
    """Leaves with an axis of all stacks cut into a tree for each, of the sizes."""
    ends = list(accumulate(sizes))
    before = (slice(None),) * axis
    return tuple(
        jax.tree.map(lambda a, i=i, j=j: a[(*before, slice(i, j))], tree)
        for i, j in zip([0, *ends], ends, strict=False)
    )


def init_stacks(
    init_branch: Callable[[Network, int, optax.GradientTransformation], Branch],
    federation: Federation,
    key: Key,
    init: str,
    ids: tuple[Array, ...] | None,
) -> tuple[Branch, ...]:
    """A branch for every slot: slices of one network, or of one for each client."""
    shared = init_network(federation.model, key) if init == "shared" else None
    if ids is None:
        ids = tuple(jnp.asarray(group.ids, jnp.int32) for group in federation.groups)

    def stack(group: Group, ids: Array) -> Branch:
        def branch(i: Array) -> Branch:
            network = shared or init_network(
                federation.model, jax.random.fold_in(key, i)
            )
            return init_branch(network, group.cut, federation.optimizer)

        return jax.vmap(branch, axis_size=len(ids))(ids)

    return tuple(map(stack, federation.groups, ids))


def take_member(tree: PyTree, member: Array) -> PyTree:
    """One member of a stack."""
    return jax.tree.map(
        lambda a: jax.lax.dynamic_index_in_dim(a, member, keepdims=False), tree
    )


def put_member(tree: PyTree, member: Array, value: PyTree) -> PyTree:
    """The stack with one member replaced."""
    return jax.tree.map(
        lambda a, v: jax.lax.dynamic_update_index_in_dim(a, v, member, 0), tree, value
    )
