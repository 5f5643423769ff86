"""The simulated clock of a run: when a round opens and ends, and who is in time.

The rules are ours [ours]:

- A round opens when the round before it has ended, or later: as soon as a client that
  can be done by the deadline is available.
- A client that is not available when the round opens is *away*. A client that has begun
  stays to the end.
- A client is *late* if its round would take longer than the deadline even with the
  server for itself. If the others would still end after the deadline, because they
  queue at the server, the slowest of them are late too, as many as need be.
- A round without late clients ends when all are done; a round with late clients lasts
  the deadline.

A client that is away or late is absent: it does not train in the round, and is not in
its averages. A late client works until the round ends, and its work is lost.
"""

import bisect
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hsee_jax.core.errors import UserError
from hsee_jax.systems.availability import Availability, available_from
from hsee_jax.systems.choice import plain, upward
from hsee_jax.systems.devices import Device
from hsee_jax.systems.energy import joules, watts
from hsee_jax.systems.timing import RoundTime, round_time
from hsee_jax.systems.work import Schedule, Work

Order = npt.NDArray[np.int64]


class RoundClock(NamedTuple):
    """A round on the simulated clock."""

    begin_s: float  # the second at which it opens, since the start of the run
    seconds: float  # from its opening to its end
    joules: float  # of the devices in the round; NaN where watts are not known
    lost_bytes: float  # on the links of late clients, up and down
    away: tuple[int, ...]  # ids of the drawn clients that were not available
    late: tuple[int, ...]  # ids

    @property
    def end_s(self) -> float:
        """Return the second at which the round ends."""
        return self.begin_s + self.seconds

    def to_json(self) -> dict[str, Any]:
        """Return the figures as values of JSON; energy that is not known is None."""
        return self._asdict() | {"joules": _to_json(self.joules)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RoundClock":
        """Make a round from the result of `to_json`."""
        return cls(
            begin_s=float(values["begin_s"]),
            seconds=float(values["seconds"]),
            joules=_from_json(values["joules"]),
            lost_bytes=float(values["lost_bytes"]),
            away=tuple(map(int, values["away"])),
            late=tuple(map(int, values["late"])),
        )

    def scalars(self) -> dict[str, float]:
        """Return the figures by name, for logs and trackers."""
        found = {"seconds": self.seconds, "end_s": self.end_s, "joules": self.joules}
        found["late"] = float(len(self.late))
        return {f"simulated/{k}": v for k, v in found.items() if math.isfinite(v)}


class ClockTotals(NamedTuple):
    """The figures of a run on the simulated clock."""

    seconds: float  # at which its last round ends
    joules: float  # NaN where watts are not known
    lost_bytes: float
    late_rounds: int  # the sum over all clients of the rounds that they were late for

    def to_json(self) -> dict[str, Any]:
        """Return the figures as values of JSON; energy that is not known is None."""
        return self._asdict() | {"joules": _to_json(self.joules)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ClockTotals":
        """Make the figures from the result of `to_json`."""
        return cls(
            seconds=float(values["seconds"]),
            joules=_from_json(values["joules"]),
            lost_bytes=float(values["lost_bytes"]),
            late_rounds=int(values["late_rounds"]),
        )


def clock_totals(rounds: Sequence[RoundClock]) -> ClockTotals | None:
    """Return the figures of a run from all its rounds; None without rounds."""
    if not rounds:
        return None
    return ClockTotals(
        seconds=rounds[-1].end_s,
        joules=sum(one.joules for one in rounds),
        lost_bytes=sum(one.lost_bytes for one in rounds),
        late_rounds=sum(len(one.late) for one in rounds),
    )


def _to_json(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _from_json(value: float | None) -> float:
    return math.nan if value is None else float(value)


@dataclass(frozen=True, eq=False)
class Clock:
    """The inputs of the clock that are the same in every round of a run."""

    work: Work  # of clients 0..N-1 in a round, arrays ``[N]``
    devices: tuple[Device, ...]  # [N]
    availability: Availability = field(default_factory=dict)
    deadline_s: float = math.inf  # of a round, from its opening
    _alone: dict[Any, RoundTime] = field(default_factory=dict, repr=False)

    def alone(self, client: int, schedule: Schedule) -> RoundTime:
        """Return the round of a client that has the server for itself."""
        key = client, schedule
        if key not in self._alone:
            self._alone[key] = round_time(self.work.take([client]), schedule)
        return self._alone[key]


def clock_round(
    clock: Clock,
    schedule: Schedule,
    ids: Sequence[int],
    order: Order,
    *,
    now_s: float,
    number: int = 1,
) -> RoundClock:
    """Return the course of a round on the simulated clock.

    Args:
      clock: the run's clock.
      schedule: the round's schedule.
      ids: A clients in ascending order, who take part if they are available and in
        time.
      order: their turns at a shared server, positions in ``ids``, ``[T, A]``.
      now_s: the second at which the previous round has ended.
      number: the round's number, for errors.

    Raises:
      UserError: no client can be done by the deadline, or no client that can is ever
        available again.
    """
    able = _able(clock, schedule, ids, number)
    start = {i: available_from(clock.availability, i, now_s) for i in ids}
    begin_s = min(start[i] for i in able)
    if begin_s == math.inf:
        raise UserError(
            f"availability: after second {plain(now_s)} none of the clients that round "
            f"{number} needs is available; allowed is a trace that goes on"
        )
    there = [
        i for i in ids if available_from(clock.availability, i, begin_s) == begin_s
    ]
    course, kept = _in_time(clock, schedule, ids, order, able & set(there))
    late = tuple(sorted(set(there).difference(kept)))
    seconds = clock.deadline_s if late else course.seconds
    lost = [_lost(clock.devices[i], clock.alone(i, schedule), seconds) for i in late]
    spent = _joules(course, [clock.devices[i] for i in kept], seconds)
    return RoundClock(
        begin_s,
        seconds,
        joules=spent + sum(one.joules for one in lost),
        lost_bytes=sum((one.bytes for one in lost), 0.0),
        away=tuple(sorted(set(ids).difference(there))),
        late=late,
    )


def _able(
    clock: Clock, schedule: Schedule, ids: Sequence[int], number: int
) -> set[int]:
    """Return the clients that can be done by the deadline."""
    if clock.deadline_s == math.inf:
        return set(ids)
    seconds = {i: clock.alone(i, schedule).seconds for i in ids}
    able = {i for i in ids if seconds[i] <= clock.deadline_s}
    if not able:
        raise UserError(
            f"deadline: {plain(clock.deadline_s)} is too short for all clients of "
            f"round {number}; allowed is {upward(min(seconds.values()))} or more"
        )
    return able


def _in_time(
    clock: Clock,
    schedule: Schedule,
    ids: Sequence[int],
    order: Order,
    able: set[int],
) -> tuple[RoundTime, list[int]]:
    """Return the course of the round with the clients that are in time, and their ids.

    Each of the clients ``able`` is in time if it has the server for itself.
    """

    def course(members: Collection[int]) -> tuple[RoundTime, list[int]]:
        kept = np.isin(ids, list(members))
        places = np.cumsum(kept) - 1
        turns = places[order[kept[order]]].reshape(len(order), -1).tolist()
        clients = np.asarray(ids)[kept].tolist()
        return round_time(clock.work.take(clients), schedule, order=turns), clients

    every = course(able)
    if every[0].seconds <= clock.deadline_s:
        return every
    by_speed = sorted(able, key=lambda i: (clock.alone(i, schedule).seconds, i))

    def too_many(count: int) -> bool:
        return course(by_speed[:count])[0].seconds > clock.deadline_s

    counts = range(2, len(able))  # one is not too many, and all are
    return course(by_speed[: 1 + bisect.bisect_left(counts, True, key=too_many)])


class _Lost(NamedTuple):
    joules: float
    bytes: float


def _lost(device: Device, own: RoundTime, seconds: float) -> _Lost:
    """Return what a late client spends until the round ends.

    It works as if it had the server for itself. If the round ends first, it has spent
    the same share of everything.
    """
    share = min(1.0, seconds / own.seconds)
    spent = share * _joules(own, [device], max(own.seconds, seconds))
    return _Lost(spent, share * float(np.sum(own.up_bytes + own.down_bytes)))


def _joules(course: RoundTime, devices: Sequence[Device], seconds: float) -> float:
    """Return the joules of devices in a round of ``seconds``, idle after ``course``."""
    rest = seconds - course.seconds
    return float(np.sum(joules(course, devices) + watts(devices, "idle") * rest))
