"""The seconds of a round: who computes, sends and waits when.

Pure functions from plain numbers. For a batch of a client, ``tf`` and ``tb`` are the
seconds of its forward and its backward pass, ``u`` of the upload of its features, ``v``
of the server's step on them, and ``d`` of the download of the reply: their gradient,
or the server's logits, or both.

*Detached*: a client computes batch after batch without a pause, and its uploads follow
each other beside that. *Joint*: a client waits for the gradient of each batch. Where
exits learn from the server's logits, it waits for them in the same way; they are known
after the server's forward pass, but here they come down after its step. A shared
server takes the messages in a fixed order; with a replica for each client, W workers
take the message that has been ready longest (see `hsee_jax.systems.serving`). Where
layers of clients are averaged, every client sends them up after its last batch, waits
for the slowest, and gets the mean. Averages of servers alone take no time; the servers
wait for each other, detached clients do not.

Up- and downlink of a client depend neither on each other nor on other clients.
"""

from typing import NamedTuple

import numpy as np

from hsee_jax.algorithms.options import TURNS
from hsee_jax.systems.course import Course, Order, Setting, run
from hsee_jax.systems.intervals import Span, union_s
from hsee_jax.systems.quantities import Floats
from hsee_jax.systems.serving import Log
from hsee_jax.systems.work import Schedule, Work, activity, parts_of_round


class Shares(NamedTuple):
    """The round of each client in parts, ``float64 [N]``, which sum to the round."""

    compute_s: Floats
    link_s: Floats  # of transfers that no computation hides
    server_s: Floats  # of waiting for its messages while the server works
    waiting_s: Floats  # for other clients, directly or because the server waits


class RoundTime(NamedTuple):
    """The course of a round; arrays are ``float64 [N]``."""

    seconds: float
    shares: Shares
    busy_s: Floats  # of computing
    sending_s: Floats
    receiving_s: Floats
    idle_s: Floats  # in which a device does none of the three
    up_bytes: Floats
    down_bytes: Floats
    server_busy_s: float  # over all workers
    server_share: float  # of the round in which a worker is busy, mean over workers
    spans: tuple[Span, ...]  # for a picture, see `intervals`

    @property
    def binds(self) -> tuple[str, ...]:
        """Return the largest part of each client's round, of the four `Shares`."""
        names = [name.removesuffix("_s") for name in Shares._fields]
        return tuple(names[i] for i in np.argmax(np.stack(self.shares), axis=0))


def round_time(
    work: Work, schedule: Schedule, *, workers: int = 1, order: Order | None = None
) -> RoundTime:
    """Return the course of a round.

    With a shared server a faster client, link or server never makes the round longer,
    nor does it with replicas of one worker and a detached boundary. In the other cases
    it can, by a little, as in every queue that does not look ahead.

    Args:
      work: the work of the clients that take part.
      schedule: the round's schedule.
      workers: the workers of a server with replicas; a shared server counts as one.
      order: the turns at a shared server, the positions of all clients for each step;
        by default ascending. With ``turn="epoch"`` the first step's counts.

    Raises:
      ValueError: ``work`` does not fit together, or there is no worker, or the turn is
        unknown.
    """
    if schedule.turn not in TURNS:
        raise ValueError(f"turn: {schedule.turn} is unknown; allowed are {TURNS}")
    if workers < 1:
        raise ValueError(f"workers: {workers} is not allowed; allowed is 1 or more")
    work = work.arrays()
    setting = Setting(work, schedule, 1 if schedule.shared else workers, order)
    clients = len(work.steps)
    log = Log.empty(int(np.max(work.steps, initial=0)), clients)
    courses: list[Course] = []
    resume, free = np.zeros(clients), 0.0
    for part in parts_of_round(work, schedule):
        courses.append(run(setting, part, log, resume, free))
        resume, free = courses[-1].resume, courses[-1].free
    seconds = float(np.max(resume, initial=0.0))
    compute, link, server = (
        np.sum([getattr(course, name) for course in courses], axis=0)
        for name in ("compute_s", "link_s", "server_s")
    )
    waiting = np.maximum(seconds - compute - link - server, 0.0)
    shares = Shares(compute, link, server, waiting)
    return _result(setting, seconds, shares, _spans(setting, log, courses))


def _spans(setting: Setting, log: Log, courses: list[Course]) -> tuple[Span, ...]:
    work = setting.work
    if setting.waits:
        forward = log.arrive - work.up_s - work.forward_s
        backward = log.end + work.down_s
    else:
        forward, backward = log.forward, log.forward + work.forward_s
    spans = [
        Span("server", log.begin, log.end, log.worker),
        Span("forward", forward, forward + work.forward_s),
        Span("backward", backward, backward + work.backward_s),
        Span("upload", log.arrive - work.up_s, log.arrive),
    ]
    if setting.waits:
        spans.append(Span("download", log.end, backward))
    transfers = [course.transfer for course in courses if course.transfer is not None]
    if transfers:
        sent, got = map(np.stack, zip(*transfers, strict=True))
        spans.append(Span("weights up", sent - work.weights_up_s, sent))
        spans.append(Span("weights down", got - work.weights_down_s, got))
    return tuple(spans)


def _result(
    setting: Setting, seconds: float, shares: Shares, spans: tuple[Span, ...]
) -> RoundTime:
    work = setting.work
    served = float(np.sum(work.steps * work.server_s))
    total = seconds * setting.workers
    return RoundTime(
        seconds=seconds,
        shares=shares,
        **activity(work, setting.schedule)._asdict(),
        idle_s=np.maximum(seconds - union_s(spans[1:]), 0.0),
        server_busy_s=served,
        server_share=served / total if total > 0 else 0.0,
        spans=spans,
    )
