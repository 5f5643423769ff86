"""The queue at the server: in which order and when it takes the clients' messages.

Three disciplines fill in the same log: turns in a fixed order, all clients together,
and several workers, each of which takes the message that has been ready longest.
"""

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hsee_jax.systems.quantities import Floats


class Log(NamedTuple):
    """Times of the batches of a round, ``[S, N]``; NaN where there is no batch."""

    forward: Floats  # start of the client's forward pass
    arrive: Floats  # of the message at the server
    begin: Floats  # of the server's step
    end: Floats
    worker: npt.NDArray[np.int64]

    @classmethod
    def empty(cls, steps: int, clients: int) -> "Log":
        """Return a log without entries."""
        shape = steps, clients
        forward, arrive, begin, end = (np.full(shape, np.nan) for _ in range(4))
        return cls(forward, arrive, begin, end, np.zeros(shape, np.int64))


class Desk(NamedTuple):
    """What the server knows of its clients in a part of a round."""

    steps: Sequence[int]  # [N]: batches of each client
    server_s: Sequence[float]  # [N]
    # From the end of the server's step to the arrival of the client's next message, if
    # clients wait for replies; None if they do not: the log then holds all arrivals.
    pause_s: Sequence[float] | None
    stop: int  # the step at which the part of the round ends

    def present(self, step: int) -> list[int]:
        """Return the clients that have a batch in a step."""
        return [i for i, steps in enumerate(self.steps) if step < steps]

    def close(self, log: Log, step: int, client: int, end: float) -> None:
        """Note the end of a server's step, and when the next message will come."""
        log.end[step, client] = end
        if self.pause_s is not None and step + 1 < min(self.stop, self.steps[client]):
            log.arrive[step + 1, client] = end + self.pause_s[client]


def in_turns(
    log: Log, desk: Desk, turns: Iterable[tuple[int, int]], free: float
) -> float:
    """Take messages in the order of ``turns``.

    Args:
      log: the log to fill in.
      desk: the clients.
      turns: pairs of step and client; a pair without a batch is skipped.
      free: the second at which the server is free.

    Returns:
      The second at which the server is free again.
    """
    for step, client in turns:
        if step < desk.steps[client]:
            begin = max(free, float(log.arrive[step, client]))
            free = begin + desk.server_s[client]
            log.begin[step, client] = begin
            desk.close(log, step, client, free)
    return free


def together(log: Log, desk: Desk, steps: Iterable[int], free: float) -> float:
    """Take all clients' messages of a step at once, when the last of them is there.

    See `in_turns` for the arguments; ``steps`` are taken one after another.
    """
    for step in steps:
        present = desk.present(step)
        begin = max([free, *log.arrive[step, present].tolist()])
        free = begin + sum(desk.server_s[client] for client in present)
        log.begin[step, present] = begin
        for client in present:
            desk.close(log, step, client, free)
    return free


def by_workers(log: Log, desk: Desk, steps: range, free: float, workers: int) -> float:
    """Take the message that has been ready longest, whenever a worker is free.

    A message is ready when it has arrived and the client's replica is done with the
    message before it. See `in_turns` for the other arguments.
    """
    queue = [
        (float(log.arrive[steps.start, client]), client, steps.start)
        for client in (desk.present(steps.start) if steps else [])
    ]
    heapq.heapify(queue)
    busy = min(workers, max(len(queue), 1))  # a client has one message at a time
    idle = [(free, worker) for worker in range(busy)]
    while queue:
        ready, client, step = heapq.heappop(queue)
        since, worker = idle[0]
        begin = max(ready, since)
        end = begin + desk.server_s[client]
        heapq.heapreplace(idle, (end, worker))
        log.begin[step, client], log.worker[step, client] = begin, worker
        desk.close(log, step, client, end)
        if step + 1 in steps and step + 1 < desk.steps[client]:
            ready = max(end, float(log.arrive[step + 1, client]))
            heapq.heappush(queue, (ready, client, step + 1))
    return max(since for since, _ in idle)
