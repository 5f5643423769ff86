"""The calls of each client that a server answers at the same time."""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator

MOST = 4  # of a client: one, and some over connections that have died unnoticed


class BusyError(Exception):
    """A client has too many calls open."""


class Lines:
    """Counts the open calls of each client, so that no client delays the others."""

    def __init__(self) -> None:
        """Start with no call."""
        self._open: Counter[int] = Counter()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def line(self, i: int) -> Iterator[None]:
        """Count a call of client ``i`` in a ``with`` statement.

        Raises:
          BusyError: the client has `MOST` calls open.
        """
        with self._lock:
            if self._open[i] == MOST:
                raise BusyError
            self._open[i] += 1
        try:
            yield
        finally:
            with self._lock:
                self._open[i] -= 1
