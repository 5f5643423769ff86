"""Cuts that are planned again every few rounds, for devices that change.

A device may compute or communicate slower from some round on, and a battery runs down
by the joules of each round. The clock is deterministic, so the cuts of all rounds are
known before the first. A device whose battery does not hold the joules of a round takes
no part in it, nor in any later one.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.systems.device_file import vary
from hsee_jax.systems.devices import Device
from hsee_jax.systems.outcome import Plan, evaluate_cuts
from hsee_jax.systems.planner import Limits, plan_cuts, possible_cuts, require_watts
from hsee_jax.systems.problem import Problem, cut_costs
from hsee_jax.systems.quantities import Bools, CutCosts, Floats, Ints, totals


class RoundsPlan(NamedTuple):
    """The cuts of N clients in R rounds, planned P times."""

    starts: tuple[int, ...]  # the first round of each plan, from 1, [P]
    cuts: Ints  # [P, N]
    seconds: Floats  # of each round, [R]
    battery_joules: Floats  # that each client has left, [N]; infinite without a battery
    last_round: Ints  # for which each battery lasts, [N]; R or less


def device_in_round(device: Device, number: int) -> Device:
    """Return a device as it is in a round; rounds count from 1."""
    if device.change_round is None or number < device.change_round:
        return device
    return vary(device, device.compute_change, device.link_change)


def plan_rounds(
    problem: Problem,
    *,
    rounds: int,
    every: int,
    present: Callable[[int], Bools] | None = None,
) -> RoundsPlan:
    """Plan the fastest cuts for the devices as they are, every few rounds.

    If a battery would not last for the rounds that its client still has to train, the
    client gets a cut with which it lasts, or else the cut that draws least.

    Args:
      problem: the clients, with their devices as they are in round 1.
      rounds: R, the rounds of the run.
      every: the rounds for which a plan holds.
      present: returns which clients are to take part in a round, ``bool [N]``,
        whatever their batteries; None for all clients in all rounds.

    Raises:
      UserError: a device fits no cut, or has a battery and does not know its watts; or
        no client is present in a round, or none is left with energy for it.
    """
    count = len(problem.devices)
    left = np.array([device.battery_joules for device in problem.devices])
    batteries = np.flatnonzero(np.isfinite(left)).tolist()
    if batteries:
        require_watts(problem.devices, batteries)
    numbers = range(1, rounds + 1)
    due = np.array([np.ones(count) if present is None else present(n) for n in numbers])
    due = due.astype(bool)
    last, cuts = np.full(count, rounds), np.ones(count, np.int64)
    starts, plans, seconds = tuple(numbers[::every]), [], []
    for number in numbers:
        now = _in_round(problem, number)
        if number in starts:
            alive = np.flatnonzero(last >= number)
            most = left / np.maximum(due[number - 1 :].sum(axis=0), 1)
            chosen = _lasting_cuts(_of(now, alive), most[alive])
            # Where all need the same cut, so do clients that are absent from now on.
            cuts = np.full(count, chosen[0]) if problem.one_cut else cuts.copy()
            cuts[alive] = chosen
            plans.append(cuts)
        if not due[number - 1].any():
            raise UserError(f"present: no client is to take part in round {number}")
        ready = np.flatnonzero(due[number - 1] & (last >= number))
        who, plan = _with_energy(now, cuts, ready, left)
        if plan is None:
            raise UserError(
                f"devices: no client is left in round {number}, as batteries are "
                f"empty; allowed are fewer rounds than {number}, or more "
                "battery_joules"
            )
        last[np.setdiff1d(ready, who)] = number - 1
        finite = np.isfinite(left[who])
        left[who[finite]] -= plan.joules[finite]
        seconds.append(plan.time.seconds)
    return RoundsPlan(starts, np.array(plans), np.array(seconds), left, last)


def _with_energy(
    problem: Problem, cuts: Ints, clients: Ints, left: Floats
) -> tuple[Ints, Plan | None]:
    """Return the clients whose batteries hold their round, and the plan of it.

    Those that lack most leave first, a tenth of all that lack energy at a time, as the
    others may need less without them. There is no plan if nobody stays.
    """
    while len(clients):
        plan = evaluate_cuts(_of(problem, clients), cuts[clients])
        lacks = np.nan_to_num(plan.joules - left[clients], nan=-np.inf)
        count = int((lacks > 0).sum())
        if not count:
            return clients, plan
        most = np.argsort(-lacks, kind="stable")[: max(1, count // 10)]
        clients = np.delete(clients, most)
    return clients, None


def _in_round(problem: Problem, number: int) -> Problem:
    devices = (device_in_round(device, number) for device in problem.devices)
    rule = problem.schedule_in
    schedule = problem.schedule if rule is None else rule(number)
    return problem._replace(devices=tuple(devices), schedule=schedule)


def _of(problem: Problem, clients: Ints) -> Problem:
    """Return the problem of some of the clients."""
    devices = tuple(problem.devices[i] for i in clients)
    traffic = {cut: one.take(clients.tolist()) for cut, one in problem.traffic.items()}
    steps = problem.steps[clients]
    return problem._replace(traffic=traffic, devices=devices, steps=steps)


def _lasting_cuts(problem: Problem, most: Floats) -> Ints:
    """Return the fastest cuts with which no client needs more than ``most`` joules.

    A client that needs more with every cut gets the cut that draws least. Where several
    clients need one cut for all, batteries do not count.

    Args:
      problem: the clients' problem.
      most: joules of each client in a round, ``[N]``.
    """
    plan = plan_cuts(problem)
    shared_cut = problem.one_cut and len(most) > 1
    if shared_cut or not np.isfinite(most).any():
        return plan.cuts
    costs = cut_costs(problem, possible_cuts(problem, Limits()))
    while True:
        narrower = _without_costly(plan, costs, most)
        if (narrower == costs.allowed).all():
            return plan.cuts
        costs = costs._replace(allowed=narrower)
        plan = plan_cuts(problem, limits=Limits(cuts=narrower))


def _without_costly(plan: Plan, costs: CutCosts, most: Floats) -> Bools:
    """Forbid cuts to clients whose planned cut draws too much: those that draw no less.

    A client may always take the cut that draws least.
    """
    allowed = costs.allowed.copy()
    for client in np.flatnonzero(plan.joules > most).tolist():
        draw = _draw(costs, plan.cuts, client)
        allowed[client] &= (draw < draw[plan.cuts[client] - 1]) | (draw == draw.min())
    return allowed


def _draw(costs: CutCosts, cuts: Ints, client: int) -> Floats:
    """Return the joules of a client at each cut if the others keep theirs, ``[L]``.

    They are infinite at a cut that is not allowed.
    """
    draw = np.full(costs.allowed.shape[1], np.inf)
    cuts = cuts.copy()
    for c in np.flatnonzero(costs.allowed[client]):
        cuts[client] = c + 1
        idle = costs.idle_watts[client] * totals(costs, cuts).seconds
        draw[c] = costs.active_joules[client, c] + idle
    return draw
