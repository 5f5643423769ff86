"""Pairs of clients that train without a server.

After FedPairing (arXiv:2308.13849): two clients train both of their networks together;
each computes the layers that suit its speed, and the stronger hosts the upper layers of
the weaker. In the greedy rule the weights of gap and rate are ours.
"""

import functools

import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.systems.quantities import Floats

Pairs = tuple[tuple[int, int], ...]  # each with the lower number first, ascending
_MOST_EXACT = 16  # clients; the work grows by 2^N


def pair_seconds(
    flops: float, flops_per_s: Floats, exchange_s: Floats | float = 0.0
) -> Floats:
    """Return the seconds of each possible pair, ``[N, N]``.

    The two clients share the work of both networks, ``2 flops / (f_i + f_j)``, and
    exchange features and gradients.

    Args:
      flops: the work of one network in a round.
      flops_per_s: the speed of each client, ``[N]``.
      exchange_s: seconds of the exchange in each pair, ``[N, N]`` or one number.
    """
    return 2 * flops / np.add.outer(flops_per_s, flops_per_s) + exchange_s


def weak_share(flops_per_s: Floats, pair: tuple[int, int]) -> float:
    """Return the share of the layers that the first of a pair computes itself."""
    own, other = flops_per_s[list(pair)]
    return float(own / (own + other))


def slowest_pair_s(seconds: Floats, pairs: Pairs) -> float:
    """Return the seconds of the slowest of some pairs, given ``[N, N]`` seconds."""
    return max(float(seconds[pair]) for pair in pairs)


def fold_pairs(flops_per_s: Floats) -> Pairs:
    """Pair the slowest client with the fastest, and so on towards the middle.

    This is optimal if the exchange takes no time.

    Raises:
      UserError: the number of clients is odd.
    """
    order = np.argsort(flops_per_s, kind="stable").tolist()
    half = _half(len(order))
    return _ordered(zip(order[:half], reversed(order[half:]), strict=True))


def greedy_pairs(
    flops_per_s: Floats, rates: Floats, *, gap: float = 1.0, rate: float = 1.0
) -> Pairs:
    """Pair the clients with the largest gap in speed and the fastest link first.

    Args:
      flops_per_s: the speed of each client, ``[N]``.
      rates: bytes per second between any two clients, symmetric ``[N, N]``.
      gap: the weight of the squared gap, relative to the largest.
      rate: the weight of the rate, relative to the largest.

    Raises:
      UserError: the number of clients is odd.
    """
    _half(len(flops_per_s))
    gaps = np.subtract.outer(flops_per_s, flops_per_s) ** 2
    first, second = np.triu_indices(len(flops_per_s), 1)
    values = gap * _relative(gaps[first, second]) + rate * _relative(
        rates[first, second]
    )
    free = set(range(len(flops_per_s)))
    pairs = []
    for edge in np.argsort(-values, kind="stable"):
        pair = int(first[edge]), int(second[edge])
        if free.issuperset(pair):
            free.difference_update(pair)
            pairs.append(pair)
    return _ordered(pairs)


def exact_pairs(seconds: Floats) -> Pairs:
    """Return the pairs whose slowest pair is fastest, by trying all.

    Args:
      seconds: the seconds of each possible pair, symmetric ``[N, N]``, see
        `pair_seconds`.

    Raises:
      UserError: the number of clients is odd, or too large to try all.
    """
    count = len(seconds)
    check_exact(count)

    @functools.cache
    def best(free: frozenset[int]) -> tuple[float, Pairs]:
        if not free:
            return 0.0, ()
        first = min(free)
        options = []
        for second in free - {first}:
            slowest, pairs = best(free - {first, second})
            value = max(slowest, float(seconds[first, second]))
            options.append((value, ((first, second), *pairs)))
        return min(options)

    return best(frozenset(range(count)))[1]


def check_exact(count: int) -> None:
    """Refuse numbers of clients that `exact_pairs` does not take.

    Raises:
      UserError: the number is odd, or too large to try all.
    """
    _half(count)
    if count > _MOST_EXACT:
        raise UserError(
            f"pairs: {count} clients are too many for the exact choice; allowed are "
            f"2..{_MOST_EXACT}"
        )


def _half(count: int) -> int:
    if count % 2 or count == 0:
        raise UserError(
            f"pairs: {count} clients do not form pairs; allowed are even numbers"
        )
    return count // 2


def _relative(values: Floats) -> Floats:
    most = values.max()
    return values / most if most > 0 else values


def _ordered(pairs: object) -> Pairs:
    return tuple(sorted((min(p), max(p)) for p in pairs))  # type: ignore[attr-defined]
