"""The costs of a round for each client at each cut, and their totals for a choice."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

QUANTITIES = ("seconds", "joules", "bytes", "server_bytes")


class CutCosts(NamedTuple):
    """The costs of one round for N clients and L cuts; column ``c - 1`` is cut c.

    The seconds of the round depend on all clients together. A *detached* round
    overlaps everything, and its slowest part decides: the slowest client, the work of
    the server, or the bytes on a shared uplink. In a *lockstep* round all clients wait
    for the slowest in each of K phases, and the server works between the phases; a
    shared uplink may take longer than all of that.
    """

    phases_s: Floats  # [K, N, L]: each client's own seconds; detached: K = 1
    server_s: Floats  # [N, L]: in which the server works or waits for this client
    active_joules: Floats  # [N, L]: of the client, above what it uses when idle
    idle_watts: Floats  # [N]
    up_bytes: Floats  # [N, L]
    down_bytes: Floats  # [N, L]
    server_bytes: Floats  # [N, L]: memory of the client's replica at the server
    # Beside it, [N, L]: of the client's batch; the server holds one for each worker.
    activation_bytes: Floats
    allowed: Bools  # [N, L]: the cuts that each client may take, at least one
    lockstep: bool = False
    workers: int = 1  # the server works for this many clients at once
    uplink_bytes_per_s: float = np.inf  # of an uplink that all clients share


class Totals(NamedTuple):
    """The totals of one round over all clients; the fields are `QUANTITIES`."""

    seconds: float
    joules: float  # of the clients
    bytes: float  # up and down
    server_bytes: float  # of memory


def pick(values: Floats, cuts: Ints) -> Floats:
    """Return the value of each client at its cut.

    Args:
      values: ``[..., N, L]``.
      cuts: ``int64 [N]``, from 1 to L.

    Returns:
      ``[..., N]``.
    """
    return values[..., np.arange(len(cuts)), cuts - 1]


def totals(costs: CutCosts, cuts: Ints) -> Totals:
    """Return the totals of a round with the cuts ``int64 [N]``."""
    phases = pick(costs.phases_s, cuts).max(axis=-1)
    server = pick(costs.server_s, cuts).sum() / costs.workers
    uplink = pick(costs.up_bytes, cuts).sum() / costs.uplink_bytes_per_s
    parts = [phases.sum() + server] if costs.lockstep else [*phases, server]
    seconds = max(*parts, uplink)
    joules = pick(costs.active_joules, cuts).sum() + costs.idle_watts.sum() * seconds
    sent = pick(costs.up_bytes + costs.down_bytes, cuts).sum()
    batches = np.sort(pick(costs.activation_bytes, cuts))[-costs.workers :]
    memory = pick(costs.server_bytes, cuts).sum() + batches.sum()
    return Totals(*(float(value) for value in (seconds, joules, sent, memory)))


def rows_of(costs: CutCosts) -> Any:
    """Return one row for each client, equal for clients that no cut tells apart."""
    by_client = [
        *costs.phases_s,
        costs.server_s,
        costs.active_joules,
        costs.up_bytes,
        costs.down_bytes,
        costs.server_bytes,
        costs.activation_bytes,
        costs.allowed,
        costs.idle_watts[:, None],
    ]
    return np.concatenate(by_client, axis=1, dtype=np.float64)
