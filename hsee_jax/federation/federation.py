"""The participants: the clients in groups of one cut, their network and their link.

The clients of a group are stacked on a leading axis. A *member* is a client's position
in its group, a *slot* a position in a stack.
"""

from collections.abc import Iterable
from typing import NamedTuple

from jax.sharding import Mesh

from hsee_jax.core.errors import UserError
from hsee_jax.federation.branch import BranchSpec, client_spec, server_spec
from hsee_jax.link.codecs import FULL, Codec
from hsee_jax.nn.model import Model
from hsee_jax.optim.optimizers import OptimizerLike


class Client(NamedTuple):
    """A client: its id, which determines its random draws, and its cut."""

    id: int
    cut: int


class Group(NamedTuple):
    """The clients with the same cut; a *member* is a position in ``ids``."""

    cut: int
    ids: tuple[int, ...]  # ascending


def group_clients(clients: Iterable[Client]) -> tuple[Group, ...]:
    """Group clients by ascending cut, whatever their order.

    Raises:
      UserError: two clients have one id.
    """
    cuts: dict[int, list[int]] = {}
    seen = set()
    for client in clients:
        if client.id in seen:
            raise UserError(f"client: {client.id} is there twice; ids must differ")
        seen.add(client.id)
        cuts.setdefault(client.cut, []).append(client.id)
    return tuple(Group(cut, tuple(sorted(cuts[cut]))) for cut in sorted(cuts))


def clients_of(groups: Iterable[Group]) -> tuple[Client, ...]:
    """Return the clients in the order of groups and members; invert `group_clients`."""
    return tuple(Client(i, group.cut) for group in groups for i in group.ids)


class Federation(NamedTuple):
    """The network, the clients in groups, and how they train."""

    model: Model
    groups: tuple[Group, ...]
    optimizer: OptimizerLike  # at rate 1, such as optax.sgd(1.0, momentum=0.9)
    mesh: Mesh | None = None  # the stacks of clients are spread over its devices
    codec: Codec = FULL  # of the links from clients to servers
    micro_batches: int = 1  # in which a client takes a batch, if no gradient returns
    # Algorithms set it: the same optimizer, in its form for the servers' layers, which
    # may be averaged where those of the clients are not. Give None.
    server_optimizer: OptimizerLike | None = None
    # Whether a device takes its clients one after another in a step, or all at once.
    one_by_one: bool = False
    exits: str = "cut"  # where a client may answer, of `hsee_jax.federation.EXITS`

    @property
    def clients(self) -> tuple[Client, ...]:
        """Return the clients, see `clients_of`."""
        return clients_of(self.groups)

    def seat(self, i: int) -> tuple[int, int]:
        """Return the group of client i, and its place in the group.

        Raises:
          UserError: there is no such client.
        """
        for g, group in enumerate(self.groups):
            if i in group.ids:
                return g, group.ids.index(i)
        ids = sorted(client.id for client in self.clients)
        known = f"0..{ids[-1]}" if ids[-1] < len(ids) else ", ".join(map(str, ids))
        raise UserError(f"client: {i} is not in the run; allowed are {known}")

    def with_cuts(self, cuts: Iterable[int]) -> "Federation":
        """Return the same federation of clients 0, 1, ... with these cuts."""
        clients = (Client(i, cut) for i, cut in enumerate(cuts))
        return self._replace(groups=group_clients(clients))

    def specs(self, group: int) -> tuple[BranchSpec, BranchSpec]:
        """Describe a group's clients, and the servers behind them."""
        cut = self.groups[group].cut
        return (
            client_spec(
                self.model,
                cut,
                self.optimizer,
                self.codec,
                self.micro_batches,
                self.exits,
            ),
            server_spec(
                self.model, cut, self.server_optimizer or self.optimizer, self.codec
            ),
        )
