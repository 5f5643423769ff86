"""Count the refused messages of each client, and leave out a client with too many."""

import logging
import threading

from hsee_jax.core.errors import UserError
from hsee_jax.deployment.protocol import Refusal

_log = logging.getLogger(__name__)


def nobody_left(number: int) -> UserError:
    """Return the error that ends a round in which all clients were left out."""
    return UserError(
        f"max_refusals: no client is left in round {number}; all were left out"
    )


class Refusals:
    """Counts and logs refused messages; a client with too many is left out.

    All methods may be called in any thread.
    """

    def __init__(self, most: int) -> None:
        """Start without refusals.

        Args:
          most: the refusals of a client before the refusal that leaves it out.
        """
        self._most = most
        self._counts: dict[int, int] = {}
        self._lock = threading.Lock()

    def note(self, i: int, refusal: Refusal) -> None:
        """Count and log what was refused of a client."""
        with self._lock:
            count = self._counts[i] = self._counts.get(i, 0) + 1
        _log.warning("client %d: refused (%d): %s", i, count, refusal)
        if count == self._most + 1:
            _log.warning("client %d is left out from now on", i)

    def left_out(self) -> set[int]:
        """Return the clients that are left out."""
        with self._lock:
            return {i for i, count in self._counts.items() if count > self._most}

    def check(self, i: int) -> None:
        """Refuse a client that is left out.

        Raises:
          Refusal: the client is left out.
        """
        if i in self.left_out():
            count = self._counts[i]
            raise Refusal(f"client: {i} is left out after {count} refusals")
