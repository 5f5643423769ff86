"""What happens in a round: who takes part, with which samples, in which order.

Drawn on the host, as arrays of fixed shape, so that the compiled step holds no
data-dependent choice. Every draw is derived from (seed, what for, client, round) and
carries nothing over: it depends neither on the order or grouping of the clients nor on
where a run was resumed.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hsee_jax.strategies import Group

_PARTICIPATION, _BATCHES, _TURNS = range(3)


class RoundPlan(NamedTuple):
    """One round; N clients are in the order of the concatenated groups."""

    indices: npt.NDArray[np.int32]  # [T, N, B]: samples; 0 where padded
    mask: npt.NDArray[np.bool_]  # [T, N, B]: false on padding and on absent clients
    order: npt.NDArray[np.int32]  # [T, N]: positions in the order of their turns
    active: npt.NDArray[np.bool_]  # [N]: who takes part


def steps_per_round(
    shards: Mapping[int, npt.NDArray[np.int32]], batch_size: int
) -> int:
    """T: the batches of the client with the most samples."""
    return -(-max(map(len, shards.values())) // batch_size)


def plan_round(
    groups: Sequence[Group],
    shards: Mapping[int, npt.NDArray[np.int32]],
    *,
    batch_size: int,
    participation: float,
    turn: str,
    seed: int,
    round: int,
) -> RoundPlan:
    """Draws a round.

    Args:
      groups: the clients.
      shards: each client's samples by id, ``int32 [M_i]``. All of them are used once;
        the last batch is padded.
      batch_size: B.
      participation: the share of clients that take part, at least one.
      turn: ``"batch"``: an order of the clients for each step, or ``"epoch"``: one for
        the round.
      seed: of the run's data order.
      round: counted from 0.
    """
    ids = [i for group in groups for i in group.ids]
    steps = steps_per_round(shards, batch_size)
    indices = np.zeros((len(ids), steps * batch_size), np.int32)
    mask = np.zeros(indices.shape, np.bool_)
    num_active = max(1, int(participation * len(ids) + 0.5))
    draws = np.array([_rng(seed, _PARTICIPATION, i, round).random() for i in ids])
    active = np.zeros(len(ids), np.bool_)
    active[np.argsort(draws)[:num_active]] = True
    turns = np.zeros((len(ids), steps))
    for n, i in enumerate(ids):
        turns[n] = _rng(seed, _TURNS, i, round).random(steps)
        if active[n]:
            count = len(shards[i])
            indices[n, :count] = _rng(seed, _BATCHES, i, round).permutation(shards[i])
            mask[n, :count] = True
    if turn == "epoch":
        turns[:] = turns[:, :1]
    by_step = (len(ids), steps, batch_size)
    return RoundPlan(
        indices.reshape(by_step).swapaxes(0, 1),
        mask.reshape(by_step).swapaxes(0, 1),
        np.argsort(turns, axis=0).T.astype(np.int32),
        active,
    )


def _rng(seed: int, stream: int, client: int, round: int) -> np.random.Generator:
    return np.random.default_rng((seed, stream, client, round))
