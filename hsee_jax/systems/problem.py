"""The planner's problem: who takes part, and what a round costs at each cut."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.systems.cluster import Pipelines
from hsee_jax.systems.costs import LayerCost
from hsee_jax.systems.devices import Device
from hsee_jax.systems.energy import watts
from hsee_jax.systems.memory import server_memory
from hsee_jax.systems.quantities import Bools, CutCosts, Floats, Ints
from hsee_jax.systems.traffic import Traffic
from hsee_jax.systems.work import Schedule, Work, activity
from hsee_jax.systems.workload import workload

_MOST_SECONDS = 1e15  # of a client's round, some thirty million years


class Problem(NamedTuple):
    """N clients that train one network of L layers."""

    costs: tuple[LayerCost, ...]  # of L layers, L exits and the final head
    traffic: Mapping[int, Traffic]  # of clients at each cut that the algorithm takes
    devices: tuple[Device, ...]  # [N]
    server: Device
    schedule: Schedule  # of a round, the first with an average
    steps: Ints  # batches of each client in a round, [N]
    batch_size: int
    slots: int  # of the optimizer, see `optimizer_slots`
    micro_batches: int = 1  # into which a client divides a batch
    workers: int = 1  # of a server with replicas
    at_server: bool = False  # whether the only client is the server itself
    uplink_bytes_per_s: float = np.inf  # that all clients share
    gradient_share: float = 0.0  # of a shared server, see `Strategy`
    one_cut: bool = False  # whether the algorithm needs the same cut for all clients
    # Predicted accuracy of a client's exit at each cut, [L]; None if it is not known.
    exit_accuracy: Floats | None = None
    clusters: Mapping[int, Pipelines] = MappingProxyType({})  # by client
    # Number of a round, from 1 -> its schedule; None if all rounds have the same.
    schedule_in: Callable[[int], Schedule] | None = None

    @property
    def num_layers(self) -> int:
        """Return L."""
        return len(self.costs) // 2

    def work(self, cuts: Ints, devices: tuple[Device, ...] | None = None) -> Work:
        """Return what the clients do in a round with the cuts ``int64 [N]``."""
        return workload(
            self.costs,
            self.traffic,
            cuts.tolist(),
            self.devices if devices is None else devices,
            self.server,
            batch_size=self.batch_size,
            steps=self.steps.tolist(),
            boundary=self.schedule.boundary,
            gradient_share=self.gradient_share,
        )


def own_seconds(work: Work, schedule: Schedule) -> Floats:
    """Return the seconds of each client's round with the server for itself, ``[N]``.

    With several averages of the clients' layers in a round this is a lower bound.

    Args:
      work: the work of the clients, arrays ``[N]``.
      schedule: the round's schedule.
    """
    steps, forward, up, served = work.steps, work.forward_s, work.up_s, work.server_s
    step = forward + work.backward_s
    if schedule.waits:
        sent = end = steps * (step + up + served + work.down_s)
    else:
        slower = np.maximum(step, up)
        sent = np.maximum(steps * step, forward + up + (steps - 1) * slower)
        end = forward + up + served + (steps - 1) * np.maximum(slower, served)
    means = len(schedule.averages)
    end = np.maximum(end, sent + means * work.weights_up_s)
    return np.where(steps > 0, end, 0.0) + means * work.weights_down_s


def lockstep_seconds(work: Work, schedule: Schedule) -> Floats:
    """Return the seconds of each client in the phases of a lockstep round, ``[4, N]``.

    All clients wait for the slowest at the end of a phase: of the first batch, of the
    batches up to the last message to the server, of the last batch up to the last
    upload of layers, and of what follows. The sum of their maxima is a lower bound.

    Args:
      work: the work of the clients, arrays ``[N]``.
      schedule: the round's schedule.
    """
    steps, most = work.steps, np.max(work.steps)
    up, down = work.weights_up_s, work.weights_down_s
    # Once its batches are done, a client averages while the server works for others.
    between = sum(step < steps for step in schedule.averages)
    late = sum(step >= most for step in schedule.averages)
    first = work.forward_s + work.up_s
    last = work.down_s + work.backward_s
    longest = steps == most  # others end their last step earlier
    phases = (
        first,
        (steps - 1) * (first + last) + between * (up + down),
        (last + min(late, 1) * up) * longest,
        late * down + max(late - 1, 0) * up,
    )
    return np.stack(phases) * (steps > 0)


def server_seconds(work: Work, schedule: Schedule) -> Floats:
    """Return the seconds in which the server has time for no other client, ``[N]``.

    Args:
      work: the work of the clients, arrays ``[N]``.
      schedule: the round's schedule.
    """
    steps, served = work.steps, work.steps * work.server_s
    if not (schedule.shared and schedule.waits and schedule.turn == "epoch"):
        return served
    # A client has its turn in each chunk between two averages, where it goes on alone.
    chunks = 1 + sum(step < steps for step in schedule.averages)
    pause = work.down_s + work.backward_s + work.forward_s + work.up_s
    return served + np.maximum(steps - chunks, 0) * pause


def cut_costs(problem: Problem, allowed: Bools) -> CutCosts:
    """Return the costs of a round for each client at each cut.

    The seconds are a lower bound: a round also waits for the first and the last
    batches, and for the order of the turns.

    Args:
      problem: the planner's problem.
      allowed: whether each client may take each cut, ``[N, L]``.
    """
    shape = (len(problem.devices), problem.num_layers)
    schedule = problem.schedule
    lockstep = schedule.boundary == "joint" and schedule.turn == "together"
    phases = np.zeros((4 if lockstep else 1, *shape))
    server, joules, up, down, memory, batches = np.zeros((6, *shape))
    idle = watts(problem.devices, "idle")
    for cut in problem.traffic:
        c = cut - 1
        work = problem.work(np.full(shape[0], cut))
        done = activity(work, schedule)
        if lockstep:
            phases[:, :, c] = lockstep_seconds(work, schedule)
        else:
            phases[0, :, c] = own_seconds(work, schedule)
        server[:, c] = server_seconds(work, schedule)
        up[:, c], down[:, c] = done.up_bytes, done.down_bytes
        memory[:, c] = replica_bytes(problem, cut)
        batches[:, c] = replica_bytes(problem, cut, workers=1) - memory[:, c]
        for name in ("busy", "sending", "receiving"):
            draw = watts(problem.devices, name)
            joules[:, c] += np.nan_to_num(draw - idle) * getattr(done, f"{name}_s")
    return CutCosts(
        phases_s=phases,
        server_s=server,
        active_joules=joules,
        idle_watts=np.nan_to_num(idle),
        up_bytes=up,
        down_bytes=down,
        server_bytes=memory,
        activation_bytes=batches,
        allowed=allowed,
        lockstep=lockstep,
        workers=1 if schedule.shared else problem.workers,
        uplink_bytes_per_s=problem.uplink_bytes_per_s,
    )


def check_seconds(devices: Sequence[Device], seconds: Floats) -> None:
    """Refuse rates so low that sums of seconds would overflow or lose all digits.

    Args:
      devices: the device of each client.
      seconds: of each client's round, ``[N]``.

    Raises:
      UserError: a client takes too long.
    """
    client = int(np.argmax(seconds))
    if not seconds[client] < _MOST_SECONDS:  # also NaN
        raise UserError(
            f"devices: a round of client {client} ({devices[client].name}) takes "
            f"{seconds[client]:.3g} seconds; allowed are rates of devices and of a "
            f"shared uplink with which it takes less than {_MOST_SECONDS:.0e}"
        )


def replica_bytes(problem: Problem, cut: int, *, workers: int = 0) -> int:
    """Return the bytes of one client's replica; 0 where the server holds no replicas.

    Without a worker there are no activations.
    """
    if problem.schedule.shared or problem.schedule.boundary == "none":
        return 0
    return server_memory(
        problem.costs,
        [cut],
        batch_size=problem.batch_size,
        slots=problem.slots,
        shared=False,
        workers=workers,
    )
