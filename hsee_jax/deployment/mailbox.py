"""What arrives from devices, until the server's round takes it.

The threads of the calls put messages in, the thread of the training takes them out in
the order of the round. A device waits while a few of its messages lie here. Replies
stay until the round ends, for a device that starts again and sends its messages anew.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from hsee_jax.core.errors import Stopped
from hsee_jax.deployment.deadline import Deadline
from hsee_jax.deployment.forms import Kind, Layers
from hsee_jax.deployment.protocol import Closed, Refusal, Tensors
from hsee_jax.deployment.refusals import Refusals, nobody_left
from hsee_jax.deployment.types import Finished, Patience, Task
from hsee_jax.federation.state import Means

_AHEAD = 4  # messages of a device that wait here
_POLL_S = 10.0  # that a device waits for the answer to `next`
_TICK_S = 0.2  # between two looks at the clock and for a stop
_Rows = Mapping[int, Sequence[int]]  # of the batches of each client
_log = logging.getLogger(__name__)


class Mailbox:
    """Keeps what arrives in a round; all methods may be called in any thread.

    Attributes:
      refusals: of the messages of each client.
    """

    def __init__(self, patience: Patience, stop: Callable[[], bool]) -> None:
        """Start closed.

        Args:
          patience: of the server.
          stop: asked while the training waits; true ends the wait with `Stopped`.
        """
        self._patience, self._stop = patience, stop
        self._change = threading.Condition()
        self.refusals = Refusals(patience.max_refusals)
        self._last, self._means = dict[int, int](), Means()
        self._away: set[int] = set()  # were late, and have not called since
        self._told: set[int] = set()  # that the run has ended
        self._ended = False
        self._clear(0, {}, Layers.NONE, Kind.TRAIN)

    def _clear(self, number: int, rows: _Rows, layers: Layers, kind: Kind) -> None:
        self._open, self._kind = bool(rows), kind
        self._number, self._rows, self._layers = number, dict(rows), layers
        self._taken = dict.fromkeys(rows, 0)  # steps
        self._waiting: dict[int, dict[int, Tensors]] = {i: {} for i in rows}
        self._answers: dict[tuple[int, int], Tensors] = {}
        self._finished: dict[int, Finished] = {}
        self._late: set[int] = set()
        self._deadline = Deadline(self._patience.deadline_s)

    # The training

    def open(
        self,
        number: int,
        rows: _Rows,
        layers: Layers,
        *,
        last: Mapping[int, int],
        means: Means,
        kind: Kind = Kind.TRAIN,
    ) -> None:
        """Open a round.

        Args:
          number: its number, from 1.
          rows: of each client that is to take part, the rows of its batches.
          layers: what each client sends at the end of the round.
          last: the last round of each client that counts.
          means: the latest, for the clients.
          kind: of the round: `TRAIN`, or `EVALUATE` after the round of this number.

        Raises:
          Stopped: the training is to stop.
        """
        with self._change:
            if self._stop():
                raise Stopped(number - 1, 0)
            self._last, self._means = dict(last), means
            self._clear(number, rows, layers, kind)
            for i in sorted(self._away & rows.keys()):
                if self._spare():
                    self._be_late(i, "has not called since")
            self._change.notify_all()

    def take(self, i: int, step: int) -> Tensors | None:
        """Wait for the message of a client's step; return None if the client is late.

        Raises:
          Stopped, UserError: see `finish`.
        """
        with self._change:
            if not self._wait(i, lambda: step in self._waiting[i]):
                return None
            self._taken[i] = step + 1
            self._change.notify_all()
            return self._waiting[i].pop(step)

    def answer(self, i: int, step: int, tensors: Tensors) -> None:
        """Answer a client's step."""
        with self._change:
            self._answers[i, step] = tensors
            self._change.notify_all()

    def finish(self, i: int) -> Finished | None:
        """Wait for the end of a client's round; return None if the client is late.

        Raises:
          Stopped: the training is to stop.
          UserError: no client is left.
        """
        with self._change:
            done = self._wait(i, lambda: i in self._finished)
            return self._finished[i] if done else None

    def close(self) -> list[int]:
        """Close the round; return the clients that took part in all of it."""
        with self._change:
            self._open, self._answers = False, {}
            return sorted(self._finished.keys() - self._late)

    def end(self, *, last: Mapping[int, int], means: Means) -> None:
        """Tell all devices that call from now on that the run has ended."""
        with self._change:
            self._open, self._ended = False, True
            self._last, self._means = dict(last), means
            self._change.notify_all()

    def wait_told(self, clients: Sequence[int], seconds: float) -> None:
        """Wait until these clients know that the run has ended."""
        end = time.monotonic() + seconds
        with self._change:
            awaited = set(clients) - self.refusals.left_out()
            known = self._stop()  # a stop that came too late to end the run before
            while not self._told >= awaited and (known or not self._stop()):
                if time.monotonic() > end:
                    return
                self._change.wait(_TICK_S)

    # The calls of devices

    def task(self, i: int, alive: Callable[[], bool]) -> Task:
        """Return the next task of a client; after 10 s without one, `Kind.WAIT`."""
        end = time.monotonic() + _POLL_S
        with self._change:
            self._away.discard(i)
            while alive() and time.monotonic() < end:
                if self._ended:
                    return self._task(i, Kind.END)
                if self._wanted(i) and not self._done(i):
                    return self._task(i, self._kind)
                self._change.wait(_TICK_S)
            return self._task(i, Kind.WAIT)

    def note_told(self, i: int) -> None:
        """Note that a client knows of the end, and has what the server sent with it."""
        with self._change:
            self._told.add(i)
            self._change.notify_all()

    def put(
        self,
        i: int,
        number: int,
        step: int,
        tensors: Tensors,
        *,
        waits: bool,
        alive: Callable[[], bool],
        kind: Kind = Kind.TRAIN,
    ) -> Tensors:
        """Put a client's message in, once there is room, and return the answer to it.

        A message that was put in before gets the answer that it got then. The time that
        this takes does not count for the client's deadline.

        Raises:
          Closed: the round goes on without this message.
        """
        with self._change, self._deadline.waiting(i):
            while True:
                self._check_open(i, number, kind)
                mine, first = self._waiting[i], self._taken[i]
                if step < first or step in mine:
                    break
                if step != first + len(mine):
                    raise Closed  # the server has begun the round again
                if len(mine) < _AHEAD:
                    mine[step] = tensors
                    self._change.notify_all()
                    break
                self._pause(alive)
            while waits and (i, step) not in self._answers:
                self._check_open(i, number)
                self._pause(alive)
            return self._answers.get((i, step), {})

    def put_finish(self, i: int, number: int, finished: Finished) -> None:
        """Put in what a client sends at the end of a round.

        Raises:
          Closed: the round goes on without it, or lacks batches of the client.
        """
        with self._change:
            self._check_whole(i, number)
            self._finished.setdefault(i, finished)
            self._change.notify_all()

    def rows(self, i: int, number: int, step: int, kind: Kind = Kind.TRAIN) -> int:
        """Return the rows of a client's batch.

        Raises:
          Closed: the round goes on without the client.
          Refusal: it has no such batch.
        """
        with self._change:
            self._check_open(i, number, kind)
            found = self._rows[i]
            if not 0 <= step < len(found) or found[step] == 0:
                raise Refusal(f"step: {step} has no batch")
            return found[step]

    def all_rows(self, i: int, number: int) -> tuple[list[int], Layers]:
        """Return the rows of a client's batches, all put in, and the layers to send."""
        with self._change:
            self._check_whole(i, number)
            return list(self._rows[i]), self._layers

    # Under the lock

    def _wanted(self, i: int) -> bool:
        return self._open and i in self._rows and i not in self._late

    def _task(self, i: int, kind: Kind) -> Task:
        if kind == Kind.WAIT:
            return Task(kind, 0, Layers.NONE, 0, {})
        last = self._last.get(i, 0)
        return Task(kind, self._number, self._layers, last, self._means)

    def _done(self, i: int) -> bool:
        evaluated = self._kind == Kind.EVALUATE and not self._missing(i)
        return evaluated or i in self._finished

    def _missing(self, i: int) -> bool:
        count = sum(rows > 0 for rows in self._rows[i])
        return self._taken[i] + len(self._waiting[i]) < count

    def _check_open(self, i: int, number: int, kind: Kind = Kind.TRAIN) -> None:
        if (number, kind) != (self._number, self._kind) or not self._wanted(i):
            raise Closed

    def _check_whole(self, i: int, number: int) -> None:
        self._check_open(i, number)
        if self._missing(i):
            raise Closed

    def _pause(self, alive: Callable[[], bool]) -> None:
        if not alive():
            raise Closed
        self._change.wait(_TICK_S)

    def _wait(self, i: int, ready: Callable[[], bool]) -> bool:
        """Wait for a client; return False if it is late."""
        while not ready():
            if i in self._late:
                return False
            if i in self.refusals.left_out():
                self._be_late(i, "is left out")
            elif self._deadline.passed(i) and self._spare():
                self._be_late(i, "is late")
            elif self._stop():
                raise Stopped(self._number - 1, 0)
            else:
                self._change.wait(_TICK_S)
        return i not in self._late

    def _spare(self) -> bool:
        """Return whether enough clients are left if one more is late."""
        return len(self._rows) - len(self._late) > max(1, self._patience.min_clients)

    def _be_late(self, i: int, why: str) -> None:
        _log.warning("client %d %s; round %d goes on", i, why, self._number)
        self._late.add(i)
        self._away.add(i)
        self._change.notify_all()
        if len(self._late) == len(self._rows):
            raise nobody_left(self._number)
