"""The choice of the cuts: the best under limits, or what is wrong with the limits."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.systems.bottleneck import fastest
from hsee_jax.systems.quantities import (
    Bools,
    CutCosts,
    Floats,
    Ints,
    Totals,
    totals,
)

# The limits, by the quantity that they limit.
LIMITS = {
    "seconds": "max_seconds",
    "joules": "max_joules",
    "bytes": "max_bytes",
    "server_bytes": "max_server_memory",
}
_SLACK = 1e-6  # relative, of the solver
_Solve = Callable[[CutCosts, str, Mapping[str, float]], Ints | None]


def choose(
    costs: CutCosts,
    minimize: str = "seconds",
    limits: Mapping[str, float] | None = None,
    *,
    one_cut: bool = False,
    measure: Callable[[Ints], Totals] | None = None,
) -> Ints:
    """Return the best cuts; of equally good choices, the fastest.

    Args:
      costs: the costs of each client at each cut.
      minimize: one of `QUANTITIES`.
      limits: the most of some of `QUANTITIES`.
      one_cut: whether all clients have the same cut.
      measure: returns what cuts really need, for the error; None for their `totals`.

    Returns:
      The cuts of all clients, ``int64 [N]``, from 1 to L.

    Raises:
      UserError: no choice keeps to the limits.
    """
    limits = dict(limits or {})
    solve = _cheapest_equal if one_cut else _cheapest
    cuts = solve(costs, minimize, limits)
    if cuts is None:
        measure = measure or (lambda cuts: totals(costs, cuts))
        raise _impossible(costs, limits, solve, measure)
    if minimize == "seconds":
        return cuts
    limits[minimize] = getattr(totals(costs, cuts), minimize) * (1 + _SLACK)
    quicker = solve(costs, "seconds", limits)
    return cuts if quicker is None else quicker


def _cheapest(
    costs: CutCosts, minimize: str, limits: Mapping[str, float]
) -> Ints | None:
    """Return the best cuts by the sweep, if that is enough, or by the solver."""
    coupled = limits or costs.lockstep or costs.uplink_bytes_per_s < np.inf
    if minimize == "seconds" and not coupled:
        return fastest(
            costs.phases_s[0], costs.server_s, costs.allowed, workers=costs.workers
        )
    from hsee_jax.systems.milp import cheapest  # which imports SciPy's solvers

    return cheapest(costs, minimize, limits)


def _cheapest_equal(
    costs: CutCosts, minimize: str, limits: Mapping[str, float]
) -> Ints | None:
    """Return the best choice of one cut for all clients; None if there is none."""
    count = len(costs.allowed)
    cuts = (1 + np.flatnonzero(costs.allowed.all(axis=0))).tolist()
    sums = {cut: totals(costs, np.full(count, cut))._asdict() for cut in cuts}
    kept = [
        cut
        for cut, found in sums.items()
        if all(found[name] <= most for name, most in limits.items())
    ]
    if not kept:
        return None
    return np.full(count, min(kept, key=lambda cut: sums[cut][minimize]))


def _impossible(
    costs: CutCosts,
    limits: Mapping[str, float],
    solve: _Solve,
    measure: Callable[[Ints], Totals],
) -> UserError:
    """Return the error for limits that no choice keeps to."""
    for slack in (_SLACK, -_SLACK):  # first what is clear, then what is close
        before: dict[str, float] = {}
        for name, most in limits.items():
            cuts = solve(costs, name, before)
            if cuts is None:
                break
            if getattr(totals(costs, cuts), name) > most * (1 + slack):
                least = getattr(measure(cuts), name)
                beside = " and ".join(f"{LIMITS[n]} {plain(before[n])}" for n in before)
                return UserError(
                    f"{LIMITS[name]}: {plain(most)} is not possible"
                    f"{' with ' * bool(beside)}{beside}; allowed is {upward(least)} or "
                    "more"
                )
            before[name] = most
    return UserError(
        "cuts: no cut fits all clients, who need the same; allowed is more memory"
    )


def plain(value: float) -> str:
    """Return a number as text that a flag can read."""
    return f"{value:.10g}"


def upward(value: float) -> str:
    """Return a number, 0 or more, rounded up to four significant digits, as text."""
    if value == 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return plain(math.ceil(value / unit * (1 - 1e-12)) * unit)


def allowed_cuts(
    memory_bytes: Floats,
    most_bytes: Floats,
    *,
    names: Sequence[str],
    choices: Collection[int],
    limit: str = "max_memory",
) -> Bools:
    """Return which cuts fit each client's memory, ``[N, L]``.

    Args:
      memory_bytes: the bytes that a client needs at each cut, ``[L]``.
      most_bytes: the bytes that each client has, ``[N]``.
      names: the names of the N clients, for the error.
      choices: the cuts to choose from, at least one.
      limit: the option that limits the bytes, for the error.

    Raises:
      UserError: a client has no cut left.
    """
    among = np.isin(np.arange(1, len(memory_bytes) + 1), list(choices))
    allowed = among & (memory_bytes <= most_bytes[:, None])
    for i in np.flatnonzero(~allowed.any(axis=1)).tolist():
        raise UserError(
            f"{limit}: {plain(most_bytes[i])} bytes of client {i} ({names[i]}) is "
            f"too little for cuts {' '.join(map(str, sorted(choices)))}; allowed is "
            f"{upward(memory_bytes[among].min())} or more"
        )
    return allowed


def accurate_cuts(
    allowed: Bools, accuracy: Floats, least: float, *, one_cut: bool = False
) -> Bools:
    """Return which of the allowed cuts reach a predicted accuracy, ``[N, L]``.

    Args:
      allowed: the cuts that each client may take otherwise, ``[N, L]``.
      accuracy: the predicted exit accuracy of a client of each cut, ``[L]``.
      least: the least accuracy to reach, from 0 to 1.
      one_cut: whether all clients have the same cut.

    Raises:
      UserError: a client has no cut left, or all clients have no cut in common.
    """
    possible = allowed & allowed.all(axis=0) if one_cut else allowed
    if not possible.any():
        return allowed  # `choose` refuses it
    best = np.where(possible, accuracy[None, :], -np.inf).max(axis=1)
    if best.min() < least:
        nearest = math.floor(best.min() * 1e4) / 1e4
        raise UserError(
            f"min_exit_accuracy: {plain(least)} is not possible for client "
            f"{int(best.argmin())}, by the predicted accuracies; allowed is "
            f"{plain(nearest)} or less"
        )
    return possible & (accuracy >= least)[None, :]
