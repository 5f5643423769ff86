"""The planner: the cut of each device, and the round that follows from it.

The choice is exact for a bound of the round's seconds (see `CutCosts`); the seconds of
the plan are those of `round_time`, which follows every batch. Where clients share
gradients, the costs are those of equal cuts, a bound as well.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hsee_jax.core.errors import UserError, unknown
from hsee_jax.systems.choice import (
    LIMITS,
    accurate_cuts,
    allowed_cuts,
    choose,
    plain,
    upward,
)
from hsee_jax.systems.devices import Device
from hsee_jax.systems.memory import server_memory
from hsee_jax.systems.outcome import Plan, client_bytes, evaluate_cuts
from hsee_jax.systems.problem import Problem, check_seconds, cut_costs
from hsee_jax.systems.quantities import QUANTITIES, Bools, CutCosts, totals

_TRIES = 8
_SLACK = 1e-6  # relative, of limits
_WATTS = ("busy", "sending", "receiving", "idle")
_MINIMIZED = ("seconds", "joules", "bytes")


class Limits(NamedTuple):
    """The limits of a plan; None for no limit."""

    memory_bytes: float | None = None  # of every device; None for its own memory
    min_cut: int = 1
    seconds: float | None = None  # of a round
    joules: float | None = None  # of all clients in a round
    bytes: float | None = None  # on all links in a round
    server_bytes: float | None = None  # of the server's memory
    exit_accuracy: float | None = None  # the least that is predicted for each client
    cuts: Bools | None = None  # [N, L]: which cuts each client may take, if it has room

    def totals(self) -> dict[str, float]:
        """Return the limits of totals, by `QUANTITIES`."""
        given = ((name, getattr(self, name)) for name in QUANTITIES)
        return {name: most for name, most in given if most is not None}


def plan_cuts(
    problem: Problem, minimize: str = "seconds", limits: Limits | None = None
) -> Plan:
    """Choose the cut of each client.

    Args:
      problem: the clients, their network and their devices.
      minimize: ``"seconds"`` of a round, ``"joules"`` of all clients, or ``"bytes"`` on
        all links. Of equally good choices the fastest is taken.
      limits: what the plan keeps to; None for the memory of the devices alone.

    Raises:
      UserError: no choice keeps to the limits, nothing of this name can be minimized,
        or energy is asked for and a device does not know its watts.
    """
    if minimize not in _MINIMIZED:
        raise unknown("minimize", minimize, _MINIMIZED)
    limits = limits or Limits()
    if problem.one_cut or not problem.gradient_share:
        return _plan(problem, minimize, limits)
    # The choice takes mixed cuts as if they shared gradients as equal ones do, so the
    # best equal cut may be better, or the only one within the limits.
    plans, refusals = [], []
    for one in (problem, problem._replace(one_cut=True)):
        try:
            plans.append(_plan(one, minimize, limits))
        except UserError as error:
            refusals.append(error)
    if not plans:
        raise refusals[0]
    return min(plans, key=lambda plan: getattr(plan.totals(), minimize))


def _plan(problem: Problem, minimize: str, limits: Limits) -> Plan:
    """Return the first of the `_candidates` that keeps to the limits."""
    most = limits.totals()
    if "joules" in (minimize, *most):
        require_watts(problem.devices)
    allowed = possible_cuts(problem, limits)
    with np.errstate(over="ignore", invalid="ignore"):  # refused in the next line
        costs = cut_costs(problem, allowed)
    _check_rates(problem, costs)
    aims = dict(most)
    if problem.schedule.shared:  # `possible_cuts` sees to it
        aims.pop("server_bytes", None)
    nearest: dict[str, float] = {}
    for plan in _candidates(problem, costs, minimize, aims):
        found = plan.totals()._asdict()
        over = {n: found[n] for n, m in most.items() if found[n] > m * (1 + _SLACK)}
        if not over:
            return plan
        nearest = {n: min(value, nearest.get(n, value)) for n, value in over.items()}
    name, value = next(iter(nearest.items()))
    raise UserError(
        f"{LIMITS[name]}: {plain(most[name])} is not possible, queues included; the "
        f"nearest plan needs {upward(value)}"
    )


def _check_rates(problem: Problem, costs: CutCosts) -> None:
    """Refuse rates with which a client would take too long, see `check_seconds`."""
    seconds = costs.phases_s.sum(axis=0) + costs.server_s
    seconds = seconds + costs.up_bytes / costs.uplink_bytes_per_s
    check_seconds(problem.devices, np.where(costs.allowed, seconds, 0).max(axis=1))


def _candidates(
    problem: Problem, costs: CutCosts, minimize: str, aims: Mapping[str, float]
) -> Iterator[Plan]:
    """Yield plans within the aims, ever more cautious about what queues add.

    The last plans ignore one aim each, and have the least of its quantity.

    Raises:
      UserError: not even the bound of a plan is within the aims.
    """
    added = dict.fromkeys(aims, 0.0)
    for number in range(_TRIES):
        cautious = {name: aim - added[name] for name, aim in aims.items()}
        try:
            cuts = choose(
                costs,
                minimize,
                cautious,
                one_cut=problem.one_cut,
                measure=lambda cuts: evaluate_cuts(problem, cuts).totals(),
            )
        except UserError:
            if number == 0:
                raise
            break
        bound = totals(costs, cuts)
        plan = evaluate_cuts(problem, cuts)._replace(bound_s=bound.seconds)
        yield plan
        for name in added:
            more = getattr(plan.totals(), name) - getattr(bound, name)
            added[name] = max(added[name], more)
    for name in aims:
        others = {other: aim for other, aim in aims.items() if other != name}
        cuts = choose(costs, name, others, one_cut=problem.one_cut)
        bound_s = totals(costs, cuts).seconds
        yield evaluate_cuts(problem, cuts)._replace(bound_s=bound_s)


def possible_cuts(problem: Problem, limits: Limits) -> Bools:
    """Return which cuts each client may take, ``[N, L]``.

    Args:
      problem: the clients, their network and their devices.
      limits: `memory_bytes`, `min_cut`, `exit_accuracy` and `cuts` count, and with a
        shared server also `server_bytes`, which counts instead of `memory_bytes` if the
        server is the only client; limits of other totals do not.

    Raises:
      UserError: no cut is left, for a client or for all.
    """
    devices = problem.devices
    most = np.array([device.memory_bytes for device in devices])
    given, limit = limits.memory_bytes, "max_memory"
    if problem.at_server:
        given, limit = limits.server_bytes, "max_server_memory"
    if given is not None:
        most = np.full(len(devices), given)
    choices = [cut for cut in problem.traffic if cut >= limits.min_cut]
    if not choices:
        raise UserError(
            f"min_cut: {limits.min_cut} is not possible; allowed are "
            f"1..{max(problem.traffic)}"
        )
    if limits.server_bytes is not None and problem.schedule.shared:
        holds = {cut: _shared_bytes(problem, cut) for cut in choices}
        choices = [cut for cut in choices if holds[cut] <= limits.server_bytes]
        if not choices:
            raise UserError(
                f"max_server_memory: {plain(limits.server_bytes)} is not possible; "
                f"allowed is {upward(min(holds.values()))} or more"
            )
    allowed = allowed_cuts(
        client_bytes(problem).astype(float),
        most,
        names=[device.name for device in devices],
        choices=choices,
        limit=limit,
    )
    allowed = _within_clusters(problem, limits, allowed)
    if limits.cuts is not None:
        allowed = allowed & limits.cuts
    if limits.exit_accuracy is None:
        return allowed
    if problem.exit_accuracy is None:
        raise UserError(
            "min_exit_accuracy: needs predictions; allowed is together with "
            "accuracy_from"
        )
    return accurate_cuts(
        allowed, problem.exit_accuracy, limits.exit_accuracy, one_cut=problem.one_cut
    )


def _within_clusters(problem: Problem, limits: Limits, allowed: Bools) -> Bools:
    """Leave out the cuts whose layers the devices of a cluster cannot hold."""
    if problem.clusters and limits.memory_bytes is not None:
        raise UserError(
            "max_memory: is not allowed with clusters; allowed is memory_bytes of the "
            "devices"
        )
    allowed = allowed.copy()
    for client, pipelines in problem.clusters.items():
        allowed[client] &= [one is not None for one in pipelines.by_cut]
        if not allowed[client].any():
            raise UserError(
                f"devices: cluster {problem.devices[client].name} (client {client}) "
                "cannot hold any cut; its first and last device need a layer each, and "
                "memory_bytes for what they hold"
            )
    return allowed


def _shared_bytes(problem: Problem, cut: int) -> int:
    """Return the bytes of a shared server if all clients have this cut."""
    together = problem.schedule.turn == "together"
    return server_memory(
        problem.costs,
        [cut] * (len(problem.devices) if together else 1),
        batch_size=problem.batch_size,
        slots=problem.slots,
        shared=True,
        together=together,
    )


def require_watts(devices: Sequence[Device], clients: Sequence[int] = ()) -> None:
    """Refuse devices that do not know their watts.

    Args:
      devices: the devices of all clients.
      clients: the clients whose devices must know their watts; empty for all.

    Raises:
      UserError: a device does not know its watts.
    """
    for i in clients or range(len(devices)):
        for name in _WATTS:
            if np.isnan(getattr(devices[i], f"{name}_watts")):
                raise UserError(
                    f"devices: client {i} ({devices[i].name}) has no {name}_watts, "
                    "which energy needs; allowed is 0 or more"
                )
