"""The planner: the cut of each device, and the round that follows from it.

The choice is exact for a bound of the round's seconds (see `CutCosts`); the seconds of
the plan are those of `round_time`, which follows every batch.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.systems.bandwidth import divide_uplink
from hsee_jax.systems.choice import LIMITS, allowed_cuts, choose, upward
from hsee_jax.systems.cut_costs import Bools, Floats, Ints, Totals, totals
from hsee_jax.systems.devices import Device
from hsee_jax.systems.energy import joules
from hsee_jax.systems.memory import client_memory, server_memory
from hsee_jax.systems.problem import Problem, cut_costs, replica_bytes
from hsee_jax.systems.timing import RoundTime, round_time

_TRIES = 8
_WATTS = ("busy", "sending", "receiving", "idle")


class Limits(NamedTuple):
    """The limits of a plan; None for no limit."""

    memory_bytes: float | None = None  # of every device; None for its own memory
    min_cut: int = 1
    seconds: float | None = None  # of a round
    joules: float | None = None  # of all clients in a round
    server_bytes: float | None = None  # of the server's memory

    def totals(self) -> dict[str, float]:
        """Return the limits of totals, by `QUANTITIES`."""
        names = ("seconds", "joules", "server_bytes")
        return {n: v for n in names if (v := getattr(self, n)) is not None}


class Plan(NamedTuple):
    """The cuts of N clients, and a round with them."""

    cuts: Ints  # [N]
    time: RoundTime
    joules: Floats  # [N]; NaN where a device does not know its watts
    memory_bytes: Ints  # [N]
    server_bytes: int
    bound_s: float  # no order of the turns makes the round shorter

    def totals(self) -> Totals:
        """Return the totals over all clients."""
        sent = float(self.time.up_bytes.sum() + self.time.down_bytes.sum())
        energy = float(self.joules.sum())
        return Totals(self.time.seconds, energy, sent, float(self.server_bytes))


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
      UserError: no choice keeps to the limits, or energy is asked for and a device does
        not know its watts.
    """
    limits = limits or Limits()
    most = limits.totals()
    if "joules" in (minimize, *most):
        _require_watts(problem.devices)
    costs = cut_costs(problem, possible_cuts(problem, limits))
    aims = dict(most)
    if "server_bytes" in aims:  # beside the replicas it holds batches
        aims["server_bytes"] -= _batch_bytes(problem, costs.allowed)
    nearest = dict.fromkeys(most, np.inf)
    over: dict[str, float] = {}
    for _ in range(_TRIES):
        try:
            cuts = choose(costs, minimize, aims, one_cut=problem.one_cut)
        except UserError:
            if not over:
                raise
            break
        plan = evaluate_cuts(problem, cuts)._replace(
            bound_s=totals(costs, cuts).seconds
        )
        found = plan.totals()._asdict()
        over = {n: found[n] - m for n, m in most.items() if found[n] > m * (1 + 1e-6)}
        if not over:
            return plan
        nearest = {name: min(nearest[name], found[name]) for name in most}
        aims = {name: aim - over.get(name, 0.0) for name, aim in aims.items()}
    name = next(iter(over))
    raise UserError(
        f"{LIMITS[name]}: {most[name]:g} is not possible, queues included; the nearest "
        f"plan needs {upward(nearest[name])}"
    )


def evaluate_cuts(problem: Problem, cuts: Ints) -> Plan:
    """Return the round of given cuts ``int64 [N]``, whatever the limits."""
    work = problem.work(cuts, _on_shared_uplink(problem, cuts))
    schedule = problem.schedule
    workers = 1 if schedule.shared else problem.workers
    time = round_time(work, schedule, workers=workers)
    return Plan(
        cuts=cuts,
        time=time,
        joules=joules(time, problem.devices),
        memory_bytes=_client_bytes(problem)[cuts - 1],
        server_bytes=0
        if schedule.boundary == "none"
        else server_memory(
            problem.costs,
            cuts.tolist(),
            batch_size=problem.batch_size,
            slots=problem.slots,
            shared=schedule.shared,
            workers=workers,
        ),
        bound_s=0.0,
    )


def _on_shared_uplink(problem: Problem, cuts: Ints) -> tuple[Device, ...]:
    """Return the devices with their shares of the uplink, if they share one."""
    bandwidth = problem.uplink_bytes_per_s
    rates = np.array([device.up_bytes_per_s for device in problem.devices])
    if rates.sum() <= bandwidth:
        return problem.devices
    work = problem.work(cuts)
    means = len(problem.schedule.averages)
    sizes = work.steps * work.up_bytes + means * work.weights_bytes
    shares, _ = divide_uplink(sizes, work.forward_s, bandwidth, link_bytes_per_s=rates)
    return tuple(
        dataclasses.replace(device, up_bytes_per_s=float(share)) if share > 0 else device
        for device, share in zip(problem.devices, shares, strict=True)
    )


def _client_bytes(problem: Problem) -> Ints:
    return client_memory(
        problem.costs,
        batch_size=problem.batch_size,
        slots=problem.slots,
        boundary=problem.schedule.boundary,
    )


def possible_cuts(problem: Problem, limits: Limits) -> Bools:
    """Return which cuts each client may take, ``[N, L]``."""
    devices = problem.devices
    most = np.array([device.memory_bytes for device in devices])
    if limits.memory_bytes is not None:
        most = np.full(len(devices), limits.memory_bytes)
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
                f"max_server_memory: {limits.server_bytes:g} is not possible; allowed "
                f"is {upward(min(holds.values()))} or more"
            )
    return allowed_cuts(
        _client_bytes(problem).astype(float),
        most,
        names=[device.name for device in devices],
        choices=choices,
    )


def _shared_bytes(problem: Problem, cut: int) -> int:
    return server_memory(
        problem.costs,
        [cut],
        batch_size=problem.batch_size,
        slots=problem.slots,
        shared=True,
    )


def _batch_bytes(problem: Problem, allowed: Bools) -> float:
    """Return the most memory of the batches at a server with replicas."""
    if problem.schedule.shared:
        return 0.0
    cut = int(np.flatnonzero(allowed.any(axis=0))[0]) + 1
    weights = replica_bytes(problem, cut)
    return problem.workers * float(_shared_bytes(problem, cut) - weights)


def _require_watts(devices: tuple[Device, ...]) -> None:
    for i, device in enumerate(devices):
        for name in _WATTS:
            if np.isnan(getattr(device, f"{name}_watts")):
                raise UserError(
                    f"devices: client {i} ({device.name}) has no {name}_watts, which "
                    "energy needs; allowed is 0 or more"
                )
