"""The work of the clients in a round, and the course that an algorithm gives it."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from hsee_jax.engine.round import due_after
from hsee_jax.federation.strategy import Strategy
from hsee_jax.systems.quantities import Floats


class Work(NamedTuple):
    """The work of N clients in a round; a field is ``float64 [N]``, or one number.

    Seconds and bytes are per batch, except for those of weights, which are per average.
    """

    steps: Any  # batches in the round; 0 for a client without samples
    forward_s: Any
    backward_s: Any
    up_s: Any = 0.0
    server_s: Any = 0.0  # of the server's step on the batch
    down_s: Any = 0.0  # of the reply, if clients wait for one
    weights_up_s: Any = 0.0
    weights_down_s: Any = 0.0
    up_bytes: Any = 0.0
    down_bytes: Any = 0.0
    weights_bytes: Any = 0.0  # each way

    def arrays(self) -> "Work":
        """Return the same work with a ``float64 [N]`` array for each field.

        Raises:
          ValueError: the fields do not fit each other, or a value is negative or NaN.
        """
        fields = np.broadcast_arrays(*(np.asarray(field, float) for field in self))
        if not all(np.all(field >= 0) for field in fields):
            raise ValueError("work: a negative value or NaN; allowed is 0 or more")
        return Work(*(np.atleast_1d(field) for field in fields))

    def take(self, members: Sequence[int]) -> "Work":
        """Return the work of some clients, such as the participants, by position."""
        return Work(*(field[list(members)] for field in self.arrays()))


class Schedule(NamedTuple):
    """The course of a round under an algorithm."""

    shared: bool  # one server for all clients, else a replica for each
    boundary: str = "detached"  # see `Strategy`
    # One of TURNS, of a shared server: "batch" and "epoch" as in `Strategy`;
    # "together" takes the batches of all clients as one, in lock step.
    turn: str = "batch"
    averages: tuple[int, ...] = ()  # the steps after which layers are averaged
    distill: bool = False  # whether exits learn from the server's logits

    @property
    def waits(self) -> bool:
        """Return whether a client waits for the server's reply to each batch."""
        return self.boundary == "joint" or self.distill


class Activity(NamedTuple):
    """What the clients do in a round, whatever the order; arrays ``float64 [N]``."""

    busy_s: Floats  # of computing
    sending_s: Floats
    receiving_s: Floats
    up_bytes: Floats
    down_bytes: Floats


def activity(work: Work, schedule: Schedule) -> Activity:
    """Return what the clients do in a round.

    Args:
      work: the work of the clients, arrays ``[N]``.
      schedule: the round's schedule.
    """
    steps, means = work.steps, len(schedule.averages)
    replies = steps * schedule.waits
    return Activity(
        busy_s=steps * (work.forward_s + work.backward_s),
        sending_s=steps * work.up_s + means * work.weights_up_s,
        receiving_s=replies * work.down_s + means * work.weights_down_s,
        up_bytes=steps * work.up_bytes + means * work.weights_bytes,
        down_bytes=replies * work.down_bytes + means * work.weights_bytes,
    )


def schedule_of(strategy: Strategy, steps: int, number: int = 1) -> Schedule:
    """Return the schedule of a round under a strategy.

    Args:
      strategy: the algorithm.
      steps: the steps of each round.
      number: the number of the round, from 1.
    """
    before = (number - 1) * steps
    at_end = due_after(strategy, "rounds", number)
    averages = tuple(
        step
        for step in range(1, steps + 1)
        if due_after(strategy, "steps", before + step) or (at_end and step == steps)
    )
    return Schedule(
        strategy.shared,
        strategy.boundary,
        strategy.turn_unit,
        averages,
        strategy.distill > 0,
    )


def first_average(strategy: Strategy, steps: int) -> int:
    """Return the number of the first round with an average; 1 if there is none.

    Args:
      strategy: the algorithm.
      steps: the steps of each round.
    """
    if strategy.period == 0:
        return 1
    in_steps = strategy.period_unit == "steps"
    return -(-strategy.period // steps) if in_steps else strategy.period


class Part(NamedTuple):
    """The steps of a round between two averages of clients' layers."""

    first: int
    stop: int
    mean: bool  # whether clients' layers are averaged at the end
    chunks: tuple[range, ...]  # the steps between two averages of any layers


def parts_of_round(work: Work, schedule: Schedule) -> Iterator[Part]:
    """Yield the parts of a round.

    Args:
      work: the result of `Work.arrays`; if it has weights, clients' layers are
        averaged.
      schedule: the round's schedule.
    """
    last = int(np.max(work.steps, initial=0))
    ends = [step for step in schedule.averages if step < last]
    chunks = [range(a, b) for a, b in zip([0, *ends], [*ends, last], strict=True)]
    at_end = any(step >= last for step in schedule.averages)
    if not np.any(work.weights_up_s + work.weights_down_s + work.weights_bytes):
        yield Part(0, last, False, tuple(chunks))
        return
    for chunk in chunks:
        mean = chunk.stop < last or at_end
        yield Part(chunk.start, chunk.stop, mean, (chunk,))
    late = sum(step >= last for step in schedule.averages)
    for _ in range(late - 1):  # without the client with the most steps
        yield Part(last, last, True, (range(last, last),))
