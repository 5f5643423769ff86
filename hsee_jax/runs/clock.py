"""The simulated clock of a run, from its experiment and the devices of its clients."""

import math
from collections.abc import Sequence

from hsee_jax.core.errors import UserError
from hsee_jax.engine.plan import turn_order
from hsee_jax.runs.attendance import check_each_round
from hsee_jax.runs.equipment import Equipment, clock_devices
from hsee_jax.runs.experiment import Experiment
from hsee_jax.runs.phases import Phases
from hsee_jax.runs.unlabelled import check_one_copy
from hsee_jax.systems.availability import by_client
from hsee_jax.systems.clock import Clock, RoundClock, clock_round
from hsee_jax.systems.costs import LayerCost
from hsee_jax.systems.devices import Device
from hsee_jax.systems.replanning import device_in_round
from hsee_jax.systems.work import schedule_of
from hsee_jax.systems.workload import workload


def with_clock(experiment: Experiment, equipment: Equipment | None) -> Experiment:
    """Return an experiment whose rounds have a simulated clock.

    The clock of all rounds is known before the first: it depends on the draws, and not
    on what is learned.

    Args:
      experiment: of the run.
      equipment: of its clients; None for no clock.

    Raises:
      UserError: a device was measured with another network, or there is a round in
        which no client is available and done by the deadline; the strategy takes two
        copies of a sample; or clients are available at times, and the optimizer needs
        them in all rounds between two averages.
    """
    if equipment is None:
        return experiment
    if experiment.strategy.junction is not None:
        raise UserError(
            "devices: not allowed with a strategy whose server takes all clients' "
            "views as one; its time is not simulated"
        )
    check_one_copy(experiment.config, experiment.strategy)
    if equipment.periods:
        parts = experiment.config, experiment.federation, experiment.strategy
        check_each_round(*parts, "availability")
    phases, clocks, now_s, rounds = Phases(experiment), {}, 0.0, []
    costs = experiment.costs()  # whatever the cuts and the devices
    for number in range(1, experiment.cadence.rounds + 1):
        phase, devices = phases.at(number), _devices(experiment, equipment, number)
        state = phase.schedule.cuts_in(number), devices
        if state not in clocks:
            clocks[state] = _clock(phase, costs, equipment, devices)
        rounds.append(_round(phase, clocks[state], number - 1, now_s))
        now_s = rounds[-1].end_s
    return experiment._replace(equipment=equipment, clock=tuple(rounds))


def _devices(
    experiment: Experiment, equipment: Equipment, number: int
) -> tuple[Device, ...]:
    """Return the device of each client as it is in a round; rounds count from 1."""
    devices = clock_devices(experiment.config, equipment.fleet)
    return tuple(device_in_round(device, number) for device in devices)


def _clock(
    experiment: Experiment,
    costs: Sequence[LayerCost],
    equipment: Equipment,
    devices: tuple[Device, ...],
) -> Clock:
    batch_size = experiment.batch_size
    deadline = experiment.config.clients.deadline
    work = workload(
        costs,
        {one.cut: one for one in experiment.traffic},
        [share.cut for share in experiment.manifest],
        devices,
        equipment.fleet.server,
        batch_size=batch_size,
        steps=[-(-share.samples // batch_size) for share in experiment.manifest],
        boundary=experiment.strategy.boundary,
        gradient_share=experiment.strategy.gradient_share,
    )
    return Clock(
        work,
        devices,
        by_client(equipment.periods),
        math.inf if deadline is None else deadline,
    )


def _round(
    experiment: Experiment, clock: Clock, number: int, now_s: float
) -> RoundClock:
    """Return the course of a round; rounds count from 0."""
    groups, attendance = experiment.federation.groups, experiment.attendance
    steps = experiment.learning_rates.shape[1]
    ids = sorted(attendance.present(groups, number))
    order = turn_order(
        ids,
        steps=steps,
        turn=experiment.strategy.turn_unit,
        seed=attendance.seed,
        number=number,
    )
    schedule = schedule_of(experiment.strategy, steps, number + 1)
    return clock_round(clock, schedule, ids, order, now_s=now_s, number=number + 1)
