"""Which node of an engine is which client of a run.

A node is bound to its client once: by a list that the operator of the server gives, or,
where there is none, by what the node says the first time that it is asked. Nothing that
arrives later changes this.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hsee_jax.core.errors import UserError

_log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a client is reached; a node that starts anew is another place."""

    node: int
    since: str  # when the node went online


class Roster:
    """Knows the nodes of all clients."""

    def __init__(self, clients: int, nodes: Sequence[int] = ()) -> None:
        """Bind the nodes of a list.

        Args:
          clients: their number.
          nodes: the node of each client, by id; without them, nodes are asked.

        Raises:
          UserError: the list has another length, or a node twice.
        """
        if nodes and not len(nodes) == len(set(nodes)) == clients:
            raise UserError(
                f"nodes: {' '.join(map(str, nodes))} is not allowed; allowed are "
                f"{clients} different nodes, one for each client"
            )
        self._clients, self._listed = clients, bool(nodes)
        self._client = {node: i for i, node in enumerate(nodes)}
        self._online: dict[int, str] = {}
        self._asked: set[int] = set()

    def update(self, online: Mapping[int, str]) -> list[int]:
        """Note which nodes are online, and return the nodes to ask for their client.

        Args:
          online: the nodes that are online, and when each went online.
        """
        self._online = dict(online)
        self._asked &= online.keys()
        if self._listed:
            return []
        new = [n for n in online if n not in self._client and n not in self._asked]
        self._asked.update(new)
        return new

    def bind(self, node: int, client: object) -> None:
        """Bind a node to the client that it says it is; pass over what is not allowed.

        Args:
          node: a node that `update` returned.
          client: what it said; if this is None, the node is asked again.
        """
        if client is None:
            self._asked.discard(node)
        elif type(client) is not int or not 0 <= client < self._clients:
            _log.warning(
                "node %d has no client; allowed is a partition-id of 0..%d",
                node,
                self._clients - 1,
            )
        elif node in self._asked:
            self._client.setdefault(node, client)
            if self.place(client) != Place(node, self._online[node]):
                _log.warning("node %d waits: client %d has a node", node, client)

    def place(self, client: int) -> Place | None:
        """Return where a client is reached now; of several nodes, the first counts."""
        for node, i in self._client.items():
            if i == client and node in self._online:
                return Place(node, self._online[node])
        return None
