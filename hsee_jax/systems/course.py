"""The course of a part of a round, up to an average of clients' layers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hsee_jax.systems.intervals import busy_before
from hsee_jax.systems.quantities import Floats
from hsee_jax.systems.serving import Desk, Log, by_workers, in_turns, together
from hsee_jax.systems.work import Part, Schedule, Work

# For each step, the positions of the clients in the order of their turns.
Order = Sequence[Sequence[int]]


class Setting(NamedTuple):
    """What all parts of a round share."""

    work: Work  # as `Work.arrays` gives it
    schedule: Schedule
    workers: int
    order: Order | None  # None: ascending in each step

    @property
    def waits(self) -> bool:
        """Return whether a client waits for the server's reply to each batch."""
        return self.schedule.waits


class Transfer(NamedTuple):
    """The times of an average of clients' layers, ``[N]``."""

    sent: Floats  # end of the upload
    got: Floats  # end of the download


class Course(NamedTuple):
    """How a part of a round went; arrays are ``[N]``."""

    compute_s: Floats
    link_s: Floats
    server_s: Floats
    resume: Floats  # when each client begins the next part
    free: float  # when the server is free for the next part
    transfer: Transfer | None


def run(setting: Setting, part: Part, log: Log, start: Floats, free: float) -> Course:
    """Fill in the log of a part of a round, and return how the part went.

    Times are seconds from the start of the round.

    Args:
      setting: what all parts of the round share.
      part: the steps.
      log: the round's log.
      start: when each client begins, ``[N]``.
      free: when the server begins.
    """
    work = setting.work
    count = np.clip(work.steps, part.first, part.stop) - part.first
    compute = count * (work.forward_s + work.backward_s)
    link = _send(setting, part, log, start)
    free = _serve(setting, part, log, free)
    rows = slice(part.first, part.stop)
    served = np.max(log.end[rows], axis=0, initial=0.0, where=~np.isnan(log.end[rows]))
    served = np.maximum(served, start)
    waited = np.zeros_like(start)
    done = np.maximum(start + compute, link)
    if setting.waits:
        waited = np.nansum(log.end[rows] - log.arrive[rows], axis=0)
        back = work.down_s + work.backward_s
        done = np.where(count > 0, served + back, start)
    sent = done + (work.weights_up_s if part.mean else 0.0)
    resume = np.maximum(sent, served)
    server = _server_s(log, setting.waits, rows, sent, served)
    transfer = None
    link_s = sent - start - compute - waited
    if part.mean:
        free = float(max(free, np.max(resume)))
        resume = free + work.weights_down_s
        link_s = link_s + work.weights_down_s
        transfer = Transfer(sent, resume)
    return Course(compute, np.maximum(link_s, 0.0), server, resume, free, transfer)


def _server_s(
    log: Log, waits: bool, rows: slice, sent: Floats, served: Floats
) -> Floats:
    """Return how long each client waits for its messages while the server works.

    Seconds in which the server is idle do not count: all then wait for another client.
    """
    begin, end = log.begin[: rows.stop], log.end[: rows.stop]
    known = ~np.isnan(begin)
    busy = busy_before(begin[known], end[known])
    seconds = np.maximum(busy(served) - busy(sent), 0.0)
    if waits:
        steps = busy(log.end[rows]) - busy(log.arrive[rows])
        seconds = seconds + np.nansum(steps, axis=0)
    return seconds


def _send(setting: Setting, part: Part, log: Log, start: Floats) -> Floats:
    """Log the messages that do not depend on the server; return when links are free."""
    work, link, begin = setting.work, start, start
    stop = min(part.first + 1, part.stop) if setting.waits else part.stop
    for step in range(part.first, stop):
        active = step < work.steps
        ready = begin + work.forward_s
        link = np.where(active, np.maximum(link, ready) + work.up_s, link)
        log.forward[step] = np.where(active, begin, np.nan)
        log.arrive[step] = np.where(active, link, np.nan)
        begin = np.where(active, ready + work.backward_s, begin)
    return link


def _serve(setting: Setting, part: Part, log: Log, free: float) -> float:
    """Log the server's steps; return when it is free."""
    work, schedule = setting.work, setting.schedule
    pause = work.down_s + work.backward_s + work.forward_s + work.up_s
    clients = range(len(work.steps))
    desk = Desk(
        work.steps.astype(int).tolist(),
        work.server_s.tolist(),
        pause.tolist() if setting.waits else None,
        part.stop,
    )
    for chunk in part.chunks:
        if not schedule.shared:
            free = by_workers(log, desk, chunk, free, setting.workers)
        elif schedule.turn == "together":
            free = together(log, desk, chunk, free)
        elif schedule.turn == "epoch":
            seats = clients if setting.order is None else setting.order[0]
            free = in_turns(log, desk, ((s, i) for i in seats for s in chunk), free)
        else:
            order = setting.order
            turns = (
                (s, i) for s in chunk for i in (clients if order is None else order[s])
            )
            free = in_turns(log, desk, turns, free)
    return free
