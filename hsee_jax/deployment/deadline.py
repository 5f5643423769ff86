"""The deadline of a round, by the time that each device has had for its own work."""

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator


class Deadline:
    """Measures a round; the time in which a device waits for the server is not its own.

    The methods are called under the lock of the mailbox.
    """

    def __init__(self, limit_s: float | None) -> None:
        """Begin now.

        Args:
          limit_s: what each device has; None for any time.
        """
        self._limit_s, self._begin = limit_s, time.monotonic()
        self._waited_s: dict[int, float] = defaultdict(float)
        self._since: dict[int, float] = {}  # when a device began to wait
        self._calls = Counter[int]()  # in which a device waits now

    @contextlib.contextmanager
    def waiting(self, i: int) -> Iterator[None]:
        """Count the time in a ``with`` statement as that of the server, once."""
        self._since.setdefault(i, time.monotonic())
        self._calls[i] += 1
        try:
            yield
        finally:
            self._calls[i] -= 1
            if not self._calls[i]:
                self._waited_s[i] += time.monotonic() - self._since.pop(i)

    def passed(self, i: int) -> bool:
        """Return whether device ``i`` has had its time."""
        if self._limit_s is None:
            return False
        now = time.monotonic()
        waited_s = self._waited_s[i] + now - self._since.get(i, now)
        return now - self._begin - waited_s > self._limit_s
