"""Pairs of clients without a server: who hosts whom, and which layers.

After FedPairing (arXiv:2308.13849). Both clients of a pair train a network on their own
data. A client computes the layers of its network up to a cut, and its partner the rest,
with the exit behind the last layer and the final head; with the deepest cut a client
computes all of its network. The choice of the cuts by
trying all is ours: FedPairing splits the layers in proportion to the speeds.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.systems.choice import plain, upward
from hsee_jax.systems.devices import Device
from hsee_jax.systems.memory import parts_memory
from hsee_jax.systems.pairs import check_exact, exact_pairs, greedy_pairs
from hsee_jax.systems.problem import Problem, check_seconds
from hsee_jax.systems.quantities import Floats, Ints
from hsee_jax.systems.workload import cut_seconds, exchange_s

RULES = ("greedy", "exact")


class Pair(NamedTuple):
    """Two clients that train each other's upper layers."""

    clients: tuple[int, int]  # the lower number first
    cuts: tuple[int, int]  # of their own networks; L where the partner has no part
    busy_s: tuple[float, float]  # of computing in a round, without exchanges
    seconds: float  # of a round; infinite if the networks do not fit
    memory_bytes: tuple[int, int]


class _Costs(NamedTuple):
    """The costs of each cut 1..L of a client's own network; column L has no partner."""

    own_s: Floats  # [N, L]: seconds of a batch on the client
    hosted_s: Floats  # [N, L]: seconds of a batch of another client's upper layers
    sent: Floats  # [L]: bytes of a batch each way
    own_bytes: Ints  # [L]: memory
    hosted_bytes: Ints  # [L]: memory


def plan_pairs(
    problem: Problem, rule: str = "greedy", memory_bytes: float | None = None
) -> tuple[Pair, ...]:
    """Return pairs of all clients, each with the cuts that end its round first.

    Features and gradients cross the link between two clients without compression, and
    their transfer does not overlap with computing. The means of the weights after a
    round do not count.

    Args:
      problem: the planner's problem of a network with one exit, which is behind the
        last layer; its server and its schedule do not matter.
      rule: ``"greedy"`` as FedPairing does it, or ``"exact"``, see `exact_pairs`.
      memory_bytes: the memory of every device; None for each device's own.

    Raises:
      UserError: the number of clients is not allowed, a client takes too long, or a
        pair has too little memory.
    """
    count = len(problem.devices)
    if rule == "exact":
        check_exact(count)
    with np.errstate(over="ignore"):  # refused in the next line
        costs = _costs(problem)
    check_seconds(problem.devices, problem.steps.max() * costs.own_s.max(axis=1))
    memory = np.array([device.memory_bytes for device in problem.devices])
    if memory_bytes is not None:
        memory = np.full(count, memory_bytes)
    if rule == "exact":
        seconds = np.full((count, count), np.inf)
        found = {}
        for i, j in itertools.combinations(range(count), 2):
            pair = found[i, j] = _split(problem, costs, i, j, memory)
            seconds[i, j] = seconds[j, i] = pair.seconds
        pairs = [found[pair] for pair in exact_pairs(seconds)]
    else:
        batches_per_s = 1 / costs.own_s[:, -1]
        chosen = greedy_pairs(batches_per_s, _rates(problem.devices))
        pairs = [_split(problem, costs, i, j, memory) for i, j in chosen]
    for pair in pairs:
        if np.isinf(pair.seconds):
            raise _too_little(problem, costs, pair, memory)
    return tuple(pairs)


def _costs(problem: Problem) -> _Costs:
    layers, size = problem.num_layers, problem.batch_size
    times = [
        cut_seconds(problem.costs, one, size, exit_at_end=True)
        for one in problem.devices
    ]
    own = np.array([t.client_forward + t.client_backward for t in times])
    hosted = np.array([t.server_forward + t.server_backward for t in times])
    own[:, -1] += hosted[:, -1]
    hosted[:, -1] = 0.0
    sent = size * np.array([c.output_bytes for c in problem.costs[:layers]], float)
    sent[-1] = 0.0
    network = [*problem.costs[:layers], *problem.costs[-2:]]  # with the exit and head

    def memory(first: int, last: int) -> int:
        held = network[first:last]
        return parts_memory(held, batch_size=size, slots=problem.slots)

    end, cuts = len(network), range(1, layers)
    own_bytes = np.array([*(memory(0, cut) for cut in cuts), memory(0, end)])
    hosted_bytes = np.array([*(memory(cut, end) for cut in cuts), 0])
    return _Costs(own, hosted, sent, own_bytes, hosted_bytes)


def _split(problem: Problem, costs: _Costs, i: int, j: int, memory: Floats) -> Pair:
    """Return the fastest pair of two clients that fits their memory."""
    steps = problem.steps
    # Rows are the cuts of client i, columns those of client j.
    busy_i = steps[i] * costs.own_s[i][:, None] + steps[j] * costs.hosted_s[i][None]
    busy_j = steps[i] * costs.hosted_s[j][:, None] + steps[j] * costs.own_s[j][None]
    exchange = exchange_s(costs.sent, problem.devices[i], problem.devices[j])
    exchange = np.where(costs.sent > 0, exchange, 0.0)
    seconds = np.maximum(busy_i, busy_j) + (
        steps[i] * exchange[:, None] + steps[j] * exchange[None]
    )
    bytes_i, bytes_j = _pair_bytes(costs)
    fits = (bytes_i <= memory[i]) & (bytes_j <= memory[j])
    seconds = np.where(fits, seconds, np.inf)
    place = np.unravel_index(int(seconds.argmin()), seconds.shape)
    return Pair(
        (i, j),
        (int(place[0]) + 1, int(place[1]) + 1),
        (float(busy_i[place]), float(busy_j[place])),
        float(seconds[place]),
        (int(bytes_i[place]), int(bytes_j[place])),
    )


def _pair_bytes(costs: _Costs) -> tuple[Ints, Ints]:
    """Return the memory of both clients of a pair, ``[L, L]`` by their cuts."""
    first = costs.own_bytes[:, None] + costs.hosted_bytes[None]
    return first, first.T


def _rates(devices: Sequence[Device]) -> Floats:
    """Return bytes per second between any two clients, in the slower direction."""
    up = np.array([device.up_bytes_per_s for device in devices])
    down = np.array([device.down_bytes_per_s for device in devices])
    there = np.minimum(up[:, None], down[None])
    return np.minimum(there, there.T)


def _too_little(
    problem: Problem, costs: _Costs, pair: Pair, memory: Floats
) -> UserError:
    needed = np.maximum(*_pair_bytes(costs)).min()
    least = min(pair.clients, key=lambda client: memory[client])
    return UserError(
        f"max_memory: {plain(memory[least])} bytes of client {least} "
        f"({problem.devices[least].name}) is too little for the pair of clients "
        f"{pair.clients[0]} and {pair.clients[1]}; allowed is {upward(needed)} or more "
        "for both"
    )
