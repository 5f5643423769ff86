"""Asks the clients of a run over an engine that carries messages to nodes.

The threads of all clients share the engine: the first thread that looks for replies
looks for all of them, under a lock.
"""

import logging
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from hsee_jax.deployment.bundle import Answers, Calls, Parts, calls_of
from hsee_jax.deployment.roster import Place, Roster
from hsee_jax.deployment.service import Alive

TURN, WHO = "turn", "who"  # kinds of messages to a node
_LOOK_S = 0.5  # between two looks for replies
_NODES_S = 5.0  # between two looks for nodes
_TICK_S = 0.1
_PAUSE_S = 3.0  # before a client that did not answer is asked again
_log = logging.getLogger(__name__)


class Reply(NamedTuple):
    """What came back for a message."""

    message: str  # id of the message
    parts: Parts
    error: str = ""  # why there is no reply, in one line


class Engine(Protocol):
    """Carries messages to nodes; its methods are not called at the same time."""

    def nodes(self) -> Mapping[int, str]:
        """Return when each node that is online went online."""

    def push(self, node: int, kind: str, parts: Parts) -> str:
        """Send a message of kind `TURN` or `WHO` to a node, and return its id."""

    def pull(self, messages: Collection[str]) -> Sequence[Reply]:
        """Return what has come back for messages, each once."""


class Fleet:
    """Asks each client at its node; an `Ask`."""

    def __init__(self, engine: Engine, roster: Roster) -> None:
        """Start without replies.

        Args:
          engine: carries the messages.
          roster: knows the nodes of clients.
        """
        self._engine, self._roster = engine, roster
        self._lock = threading.Lock()
        self._open: dict[str, Reply | None] = {}
        self._who: dict[str, int] = {}  # id of a message -> the node that it asks
        self._looked = self._looked_for_nodes = float("-inf")

    def __call__(self, i: int, answers: Answers, alive: Alive) -> Calls | None:
        """See `Ask`."""
        place = self._find(i, alive)
        if place is None:
            return None
        with self._lock:
            message = self._engine.push(place.node, TURN, answers)
            self._open[message] = None
        try:
            reply = self._await(i, message, place, alive)
        finally:
            with self._lock:
                del self._open[message]
        if reply is not None and not reply.error:
            return calls_of(reply.parts)
        if reply is not None:
            _log.warning("client %d: %s; it is asked again", i, reply.error)
        self._pause(alive)
        return None

    def _find(self, i: int, alive: Alive) -> Place | None:
        """Wait until a client has a place."""
        while alive():
            self._look()
            with self._lock:
                place = self._roster.place(i)
            if place is not None:
                return place
            time.sleep(_TICK_S)
        return None

    def _await(self, i: int, message: str, place: Place, alive: Alive) -> Reply | None:
        """Wait for a reply, as long as the client is where it was asked."""
        while alive():
            self._look()
            with self._lock:
                reply, now = self._open[message], self._roster.place(i)
            if reply is not None:
                return reply
            if now != place:
                _log.warning("client %d: node %d went away", i, place.node)
                return None
            time.sleep(_TICK_S)
        return None

    def _look(self) -> None:
        """Look for nodes and replies, unless a thread has just done it."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked < _LOOK_S:
                return
            self._looked = now
            if now - self._looked_for_nodes > _NODES_S:
                self._looked_for_nodes = now
                for node in self._roster.update(self._engine.nodes()):
                    self._who[self._engine.push(node, WHO, {})] = node
            waiting = [m for m, reply in self._open.items() if reply is None]
            for reply in self._engine.pull([*waiting, *self._who]):
                if reply.message in self._who:
                    self._roster.bind(self._who.pop(reply.message), _client(reply))
                elif reply.message in self._open:
                    self._open[reply.message] = reply

    def _pause(self, alive: Alive) -> None:
        end = time.monotonic() + _PAUSE_S
        while alive() and time.monotonic() < end:
            time.sleep(_TICK_S)


def _client(reply: Reply) -> int | None:
    """Return the client that a node says it is; None if it did not reply."""
    if reply.error:
        return None
    said = reply.parts.get("client", b"")[:10]
    return int(said) if said.isdigit() else -1
