"""The plan of a round: its participants, their samples and the order of their turns.

The host draws a plan as arrays of fixed shape, so that the compiled step holds no
data-dependent choice. Every draw is derived from (seed, purpose, round), or (seed,
purpose, client, round), and carries nothing over: it depends neither on the order or
grouping of the clients, nor on devices, nor on where a run was resumed.

The clients of a round sit in the *slots* of its stacks. Each group has a fixed number
of slots, whoever takes part; the rest of its slots are empty.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hsee_jax.algorithms.options import TURNS
from hsee_jax.core.errors import unknown
from hsee_jax.federation.federation import Group

_PARTICIPATION, _BATCHES, _TURNS, _DROPOUT = range(4)
EMPTY = -1  # the id in a slot that no client sits in


class RoundPlan(NamedTuple):
    """The plan of one round; its N slots are the slots of the groups in order."""

    ids: npt.NDArray[np.int32]  # [N]: the client in each slot, or EMPTY
    active: npt.NDArray[np.bool_]  # [N]: whether the client takes part
    indices: npt.NDArray[np.int32]  # [T, N, B]: samples; 0 where padded
    mask: npt.NDArray[np.bool_]  # [T, N, B]: false on padding and on absent clients
    order: npt.NDArray[np.int32]  # [T, A]: slots of the drawn clients, in turn


class Absence(NamedTuple):
    """Rounds that a client misses, counted from 1."""

    client: int
    first: int
    last: int


def steps_per_round(
    shards: Mapping[int, npt.NDArray[np.int32]], batch_size: int
) -> int:
    """Return T, the number of batches of the client with the most samples."""
    return -(-max(map(len, shards.values())) // batch_size)


def num_drawn(clients: int, participation: float) -> int:
    """Return how many of some clients take part in a round: at least one."""
    return max(1, int(participation * clients + 0.5))


def participants(
    groups: Sequence[Group], *, participation: float, seed: int, number: int
) -> set[int]:
    """Draw the clients that take part in a round: a share of them, at least one."""
    ids = np.sort(np.concatenate([group.ids for group in groups]))
    count = num_drawn(len(ids), participation)
    if count == len(ids):
        return set(ids.tolist())
    draws = np.random.default_rng((seed, _PARTICIPATION, number)).random(ids[-1] + 1)
    return set(ids[np.argsort(draws[ids])[:count]].tolist())


def missing(
    ids: Iterable[int],
    *,
    dropout: float,
    absences: Collection[Absence],
    seed: int,
    number: int,
) -> set[int]:
    """Return the clients that miss a round, drawn for it or not.

    Args:
      ids: the ids of all clients.
      dropout: the probability that a client misses the round by chance.
      absences: the absences that are known in advance.
      seed: the seed of the draws.
      number: the number of the round, from 0.
    """
    known = {a.client for a in absences if a.first <= number + 1 <= a.last}
    if dropout == 0:
        return known
    every = np.array(list(ids))
    draws = np.random.default_rng((seed, _DROPOUT, number)).random(every.max() + 1)
    return known | set(every[draws[every] < dropout].tolist())


def num_slots(
    groups: Sequence[Group],
    *,
    participation: float,
    seed: int,
    rounds: int,
    multiple: int = 1,
) -> tuple[int, ...]:
    """Return the number of slots of each group, enough for the clients of any round.

    Args:
      groups: the clients.
      participation: see `plan_round`.
      seed: see `plan_round`.
      rounds: the rounds of the run.
      multiple: each number of slots is a multiple of this, the number of devices.
    """
    members, most = [set(group.ids) for group in groups], [1] * len(groups)
    for number in range(rounds if participation < 1 else 1):
        drawn = participants(
            groups, participation=participation, seed=seed, number=number
        )
        most = [max(most[g], len(drawn & own)) for g, own in enumerate(members)]
    return tuple(-(-count // multiple) * multiple for count in most)


def take_seats(
    groups: Sequence[Group], slots: Sequence[int], who: set[int]
) -> npt.NDArray[np.int32]:
    """Return the client in each slot, ``int32 [N]``.

    A group with a slot for every member seats all of them, so that they keep their
    slots; any other group seats only the clients in ``who``.
    """
    seats = []
    for group, count in zip(groups, slots, strict=True):
        everyone = count >= len(group.ids)
        seated = [i for i in group.ids if everyone or i in who]
        seats.extend(seated + [EMPTY] * (count - len(seated)))
    return np.array(seats, np.int32)


def plan_round(
    groups: Sequence[Group],
    shards: Mapping[int, npt.NDArray[np.int32]],
    *,
    batch_size: int,
    participation: float,
    turn: str,
    seed: int,
    number: int,
    slots: Sequence[int] | None = None,
    missing: Collection[int] = (),
    one_draw: bool = False,
) -> RoundPlan:
    """Draw the plan of a round.

    Args:
      groups: the clients.
      shards: each client's samples by id, ``int32 [M_i]``. The round uses each sample
        once and pads the last batch.
      batch_size: B.
      participation: the share of clients that take part, at least one client.
      turn: ``"batch"`` draws an order of the clients for each step, ``"epoch"`` one
        order for the round; with ``"together"`` nothing reads the order.
      seed: the seed of the run's data order.
      number: the number of the round, from 0.
      slots: the slots of each group, see `num_slots`; None for a slot for each member.
      missing: clients that miss the round even if they were drawn; they keep their
        turns, without samples.
      one_draw: whether all clients take their samples in one order, so that clients
        with the same events take the same events in a step; all need as many samples.
    """
    who = participants(groups, participation=participation, seed=seed, number=number)
    slots = [len(group.ids) for group in groups] if slots is None else slots
    ids = take_seats(groups, slots, who)
    steps = steps_per_round(shards, batch_size)
    indices = np.zeros((len(ids), steps, batch_size), np.int32)
    mask = np.zeros(indices.shape, np.bool_)
    active = np.isin(ids, list(who - set(missing)))
    (seats,) = np.nonzero(np.isin(ids, list(who)))
    for n in seats:
        i = int(ids[n])
        stream = 0 if one_draw else i
        indices[n], own = own_batches(
            shards[i], indices[n].shape, seed=seed, client=stream, number=number
        )
        mask[n] = own & active[n]
    order = turn_order(ids[seats], steps=steps, turn=turn, seed=seed, number=number)
    return RoundPlan(
        ids,
        active,
        indices.swapaxes(0, 1),
        mask.swapaxes(0, 1),
        seats[order].astype(np.int32),
    )


def own_batches(
    shard: npt.NDArray[np.int32],
    shape: tuple[int, ...],
    *,
    seed: int,
    client: int,
    number: int,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Draw one client's batches of a round; they depend on its own shard alone.

    Args:
      shard: the client's samples, ``int32 [M_i]``.
      shape: ``(T, B)``, with room for all of them.
      seed: see `plan_round`.
      client: the id of the client.
      number: see `plan_round`.

    Returns:
      Samples, ``int32 [T, B]``, and their mask, false on padding at the end.
    """
    steps, batch_size = shape
    indices = np.zeros(steps * batch_size, np.int32)
    indices[: len(shard)] = _rng(seed, _BATCHES, client, number).permutation(shard)
    mask = np.arange(steps * batch_size) < len(shard)
    return indices.reshape(shape), mask.reshape(shape)


def turn_order(
    ids: Iterable[int], *, steps: int, turn: str, seed: int, number: int
) -> npt.NDArray[np.int64]:
    """Draw the order of the turns of A clients in a round, as positions in ``ids``.

    Whoever else takes part, two clients keep their order.

    Args:
      ids: the clients.
      steps: T.
      turn: see `plan_round`.
      seed: see `plan_round`.
      number: the number of the round, from 0.

    Returns:
      ``int64 [T, A]``.
    """
    if turn not in TURNS:
        raise unknown("turn", turn, TURNS)
    turns = np.array([_rng(seed, _TURNS, int(i), number).random(steps) for i in ids])
    if turn == "epoch":
        turns[:] = turns[:, :1]
    return np.argsort(turns, axis=0).T


def _rng(seed: int, stream: int, client: int, number: int) -> np.random.Generator:
    return np.random.default_rng((seed, stream, client, number))
