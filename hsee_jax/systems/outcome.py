"""The outcome of some cuts: the course of a round, its energy and its memory."""

import dataclasses
from typing import NamedTuple

import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.systems.bandwidth import divide_uplink
from hsee_jax.systems.devices import Device
from hsee_jax.systems.energy import joules
from hsee_jax.systems.memory import client_memory, server_memory
from hsee_jax.systems.problem import Problem
from hsee_jax.systems.quantities import Floats, Ints, Totals
from hsee_jax.systems.timing import RoundTime, round_time
from hsee_jax.systems.work import Work, activity


class Plan(NamedTuple):
    """The cuts of N clients, and a round with them."""

    cuts: Ints  # [N]
    time: RoundTime
    joules: Floats  # [N]; NaN where a device does not know its watts
    memory_bytes: Ints  # [N]
    server_bytes: int
    bound_s: float | None = None  # the planner's lower bound of the round's seconds

    def totals(self) -> Totals:
        """Return the totals over all clients."""
        sent = float(self.time.up_bytes.sum() + self.time.down_bytes.sum())
        energy = float(self.joules.sum())
        return Totals(self.time.seconds, energy, sent, float(self.server_bytes))


def evaluate_cuts(problem: Problem, cuts: Ints) -> Plan:
    """Return the cuts ``int64 [N]`` with their round, whatever the limits.

    Raises:
      UserError: the algorithm does not take a cut.
    """
    cuts = np.asarray(cuts)
    if other := set(cuts.tolist()) - problem.traffic.keys():
        known = ", ".join(map(str, problem.traffic))
        raise UserError(f"cuts: {min(other)} is not allowed; allowed are {known}")
    own, schedule = problem.work(cuts), problem.schedule
    work = problem.work(cuts, _on_shared_uplink(problem, own))
    workers = 1 if schedule.shared else problem.workers
    time = round_time(work, schedule, workers=workers)
    memory = client_bytes(problem)[cuts - 1]
    if problem.clusters:  # whose devices keep the activations of the whole batch
        whole = client_bytes(problem._replace(micro_batches=1))
        of_clusters = list(problem.clusters)
        memory[of_clusters] = whole[cuts[of_clusters] - 1]
    return Plan(
        cuts=cuts,
        time=time,
        # A share of an uplink counts as turns at the own rate, with idle time between.
        joules=joules(
            time._replace(sending_s=activity(own, schedule).sending_s),
            problem.devices,
        ),
        memory_bytes=memory,
        server_bytes=int(memory.sum()) * problem.at_server
        if schedule.boundary == "none"
        else server_memory(
            problem.costs,
            cuts.tolist(),
            batch_size=problem.batch_size,
            slots=problem.slots,
            shared=schedule.shared,
            workers=workers,
            together=schedule.turn == "together",
        ),
    )


def client_bytes(problem: Problem) -> Ints:
    """Return the bytes of memory that a client of each cut needs, ``int64 [L]``."""
    return client_memory(
        problem.costs,
        batch_size=-(-problem.batch_size // problem.micro_batches),
        slots=problem.slots,
        boundary=problem.schedule.boundary,
    )


def _on_shared_uplink(problem: Problem, work: Work) -> tuple[Device, ...]:
    """Return the devices with their shares of the uplink, if they share one.

    Layers that are sent within the round count as sent at its end, and messages have
    no overhead.
    """
    bandwidth = problem.uplink_bytes_per_s
    rates = np.array([device.up_bytes_per_s for device in problem.devices])
    if rates.sum() <= bandwidth:
        return problem.devices
    steps, batch = work.steps, work.up_bytes
    weights = len(problem.schedule.averages) * work.weights_bytes
    step_s = work.forward_s + work.backward_s
    if problem.schedule.waits:  # nothing is sent while a client computes, or waits
        sizes = steps * batch + weights
        starts = steps * (step_s + work.server_s + work.down_s)
    else:  # all from the first batch on, the rest from the last, and layers after it
        trains = steps > 0
        sizes = np.stack([steps * batch, trains * batch, 0 * batch]) + weights
        last_s = (steps - 1) * step_s + work.forward_s
        done_s = np.where(weights > 0, steps * step_s, last_s)
        starts = trains * np.stack([work.forward_s, last_s, done_s])
    shares, _ = divide_uplink(sizes, starts, bandwidth, link_bytes_per_s=rates)
    return tuple(
        dataclasses.replace(device, up_bytes_per_s=float(share))
        if share > 0
        else device
        for device, share in zip(problem.devices, shares, strict=True)
    )
