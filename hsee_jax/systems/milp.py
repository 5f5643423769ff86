"""Cuts under limits that couple the clients, by mixed-integer linear programming.

All totals of a round are linear in how many clients of a kind take each cut, and in the
seconds of the round. Clients that no cost tells apart are of one kind, which keeps a
program for a hundred devices of three kinds as small as one for three. The solver is
HiGHS, in `scipy.optimize.milp`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from hsee_jax.systems.quantities import (
    Bools,
    CutCosts,
    Floats,
    Ints,
    rows_of,
    totals,
)

_GAP = 1e-9  # relative, of the solver
_SOLVED, _INFEASIBLE = 0, 2  # of the status


class _Kinds(NamedTuple):
    """The G kinds of clients."""

    first: Ints  # [G]: a client of each kind
    members: list[Ints]  # the clients of each kind
    sizes: Floats  # [G]
    allowed: Bools  # [G, L]


class _Program(NamedTuple):
    """A program over V variables.

    The variables are the number of clients of each of G kinds at each of L cuts,
    whether there are any, and the length of each phase and of the round, in a unit that
    keeps the numbers near 1.
    """

    totals: Mapping[str, Floats]  # of each quantity, [V]
    constraints: list[LinearConstraint]
    upper: Floats  # [V]
    integers: int  # the first ``integers`` variables are whole numbers


def cheapest(
    costs: CutCosts, minimize: str, limits: Mapping[str, float]
) -> Ints | None:
    """Return the cuts with the least total of one quantity, under limits of others.

    Args:
      costs: the costs of each client at each cut.
      minimize: one of `QUANTITIES`.
      limits: the most of some of `QUANTITIES`.

    Returns:
      The cuts ``int64 [N]``, from 1 to L; None if no choice keeps to the limits.

    Raises:
      RuntimeError: the solver failed.
    """
    needs_memory = "server_bytes" in (minimize, *limits)
    programs = _linear_in_memory(costs) if needs_memory else [costs]
    found = [_solve(one, minimize, limits) for one in programs]
    return min(
        (cuts for cuts in found if cuts is not None),
        key=lambda cuts: getattr(totals(costs, cuts), minimize),
        default=None,
    )


def _linear_in_memory(costs: CutCosts) -> Iterator[CutCosts]:
    """Yield costs whose sum of `server_bytes` is all of the server's memory, or more.

    The W largest batches together are the least, over all levels, of W times the level
    and of what each batch exceeds it by. The sizes of the batches are levels enough.
    """
    count, most = len(costs.allowed), costs.activation_bytes
    levels = [0.0] if costs.workers >= count else np.unique(most[costs.allowed])
    for level in levels:
        batches = np.maximum(most - level, 0.0) + costs.workers * level / count
        yield costs._replace(server_bytes=costs.server_bytes + batches)


def _solve(costs: CutCosts, minimize: str, limits: Mapping[str, float]) -> Ints | None:
    """Return the cuts with the least total, where `server_bytes` simply add up."""
    kinds = _kinds(costs)
    program = _program(costs, kinds)
    scales = {name: np.abs(row).max() or 1.0 for name, row in program.totals.items()}
    capped = [
        LinearConstraint(
            sparse.csr_array((program.totals[name] / scales[name])[None]),
            -np.inf,
            most / scales[name],
        )
        for name, most in limits.items()
    ]
    result = milp(
        program.totals[minimize] / scales[minimize],
        integrality=np.arange(len(program.upper)) < program.integers,
        bounds=Bounds(0, program.upper),
        constraints=[*program.constraints, *capped],
        options={"mip_rel_gap": _GAP},
    )
    if result.status not in (_SOLVED, _INFEASIBLE):
        raise RuntimeError(f"the solver failed: {result.message}")
    if result.x is None:
        return None
    return _deal(result.x, kinds)


def _kinds(costs: CutCosts) -> _Kinds:
    _, first, kind = np.unique(
        rows_of(costs), axis=0, return_index=True, return_inverse=True
    )
    members = [np.flatnonzero(kind == g) for g in range(len(first))]
    sizes = np.array([len(clients) for clients in members], float)
    return _Kinds(first, members, sizes, costs.allowed[first])


def _deal(values: Any, kinds: _Kinds) -> Ints:
    """Give the clients of each kind the cuts of the solution, in ascending order."""
    layers = kinds.allowed.shape[1]
    numbers = np.rint(values[: kinds.allowed.size]).astype(int).reshape(-1, layers)
    cuts = np.zeros(int(kinds.sizes.sum()), np.int64)
    for clients, own in zip(kinds.members, numbers, strict=True):
        cuts[clients] = np.repeat(np.arange(1, layers + 1), own)
    return cuts


def _program(costs: CutCosts, kinds: _Kinds) -> _Program:
    first, _, sizes, allowed = kinds
    phases = np.where(allowed, costs.phases_s[:, first], 0.0)
    unit = max(phases.max(), costs.server_s.max()) or 1.0  # of seconds
    cells, num_phases = allowed.size, len(phases)
    seconds = np.zeros(2 * cells + num_phases + 1)
    seconds[-1] = 1.0

    def total(values: Floats) -> Floats:
        row = np.zeros_like(seconds)
        row[:cells] = np.where(allowed, values[first], 0.0).ravel()
        return row

    server = total(costs.server_s) / (costs.workers * unit)
    uplink = total(costs.up_bytes) / (costs.uplink_bytes_per_s * unit)
    waits = np.zeros_like(seconds)
    waits[2 * cells : -1] = 1.0
    parts = [waits + server] if costs.lockstep else [waits, server]
    ends = sparse.csr_array(np.array([*parts, uplink]) - seconds)
    most = [(allowed * sizes[:, None]).ravel(), allowed.ravel()]
    return _Program(
        totals={
            "seconds": unit * seconds,
            "joules": total(costs.active_joules)
            + unit * costs.idle_watts.sum() * seconds,
            "bytes": total(costs.up_bytes + costs.down_bytes),
            "server_bytes": total(costs.server_bytes),
        },
        constraints=[
            _everyone(sizes, allowed.shape[1], len(seconds)),
            *_waits(phases / unit, sizes),
            LinearConstraint(ends, -np.inf, 0.0),
        ],
        upper=np.concatenate([*most, np.full(num_phases + 1, np.inf)]),
        integers=2 * cells,
    )


def _everyone(sizes: Floats, layers: int, width: int) -> LinearConstraint:
    """Require that every client of each kind has one cut."""
    count = len(sizes)
    sums = sparse.kron(sparse.eye_array(count), np.ones((1, layers)))
    rest = sparse.csr_array((count, width - count * layers))
    return LinearConstraint(sparse.hstack([sums, rest], "csr"), sizes, sizes)


def _waits(phases: Floats, sizes: Floats) -> list[LinearConstraint]:
    """Require that every phase lasts as long as its slowest client.

    Args:
      phases: seconds in each phase, ``[K, G, L]``.
      sizes: the clients of each kind, ``[G]``.
    """
    num_phases, count, layers = phases.shape
    cells = count * layers
    none = sparse.csr_array((cells, cells))
    some = sparse.diags_array(-np.repeat(sizes, layers))
    rest = sparse.csr_array((cells, num_phases + 1))
    rows = [sparse.hstack([sparse.eye_array(cells), some, rest], "csr")]
    mean = sparse.kron(sparse.diags_array(1 / sizes), np.ones((1, layers)))
    for k, seconds in enumerate(phases):
        spent = sparse.diags_array(seconds.ravel())
        lasts = np.zeros((cells, num_phases + 1))
        lasts[:, k] = -1.0
        rows.append(sparse.hstack([none, spent, lasts], "csr"))
        # A mean is no more than the slowest, which helps the solver.
        parts = [mean @ spent, none[:count], lasts[:count]]
        rows.append(sparse.hstack(parts, "csr"))
    return [LinearConstraint(row, -np.inf, 0.0) for row in rows]
