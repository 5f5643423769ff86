"""The planner's problem from a `Config` and a file of devices."""

import dataclasses
from functools import partial
from typing import NamedTuple

import numpy as np

from hsee_jax.config.schema import Config
from hsee_jax.config.values import override
from hsee_jax.core.errors import UserError
from hsee_jax.data.info import TRAIN_SAMPLES, DatasetInfo
from hsee_jax.federation.federation import Client, Federation, Group, group_clients
from hsee_jax.federation.schedule import CutSchedule
from hsee_jax.federation.strategy import Strategy
from hsee_jax.runs.attendance import attendance_of
from hsee_jax.runs.build import build_federation, build_strategy
from hsee_jax.runs.cut_schedule import with_schedule
from hsee_jax.runs.data import build_data, build_info
from hsee_jax.runs.material import deal_labels, with_labels
from hsee_jax.runs.unlabelled import check_one_copy
from hsee_jax.systems.cluster import Pipelines, best_pipelines, cluster_device
from hsee_jax.systems.costs import LayerCost, layer_costs
from hsee_jax.systems.device_file import Fleet
from hsee_jax.systems.devices import Device
from hsee_jax.systems.memory import optimizer_slots
from hsee_jax.systems.problem import Problem
from hsee_jax.systems.quantities import Bools, Ints
from hsee_jax.systems.replanning import plan_rounds
from hsee_jax.systems.traffic import Traffic
from hsee_jax.systems.work import first_average, schedule_of
from hsee_jax.systems.workload import traffic_by_cut

_WITHOUT_LABELS = ("iid", "quantity")  # partitions whose sizes ignore the labels


class Resources(NamedTuple):
    """What the clients run on."""

    fleet: Fleet
    workers: int = 1  # of a server with replicas
    uplink_bytes_per_s: float = np.inf  # that all clients share


class Planning(NamedTuple):
    """The parts of the planner's problem that do not depend on the algorithm."""

    config: Config
    resources: Resources
    info: DatasetInfo
    federation: Federation  # its clients and cuts do not matter
    costs: tuple[LayerCost, ...]
    samples: Ints  # of each client, [N]

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Return the names of the L layers."""
        return self.federation.model.layer_names


def planning(config: Config, resources: Resources) -> Planning:
    """Read what the planner needs from a configuration.

    Args:
      config: of the run; its cuts and its number of clients do not matter.
      resources: a device for each client, and the server.

    Raises:
      UserError: the configuration is not valid, or its partition needs data that are
        not there.
    """
    count = len(resources.fleet.clients)
    config = override(config, cuts=("1",), num_clients=count, absences=())
    info = build_info(config.data)
    federation = build_federation(config, info, plain=True)
    return Planning(
        config,
        resources,
        info,
        federation,
        layer_costs(federation.model, federation.exits),
        _samples(config),
    )


def problem_of(given: Planning, strategy: str | None = None) -> Problem:
    """Return the planner's problem under an algorithm.

    Args:
      given: of `planning`.
      strategy: the name of the algorithm; None for that of the configuration.

    Raises:
      UserError: the algorithm does not fit the configuration.
    """
    config, (fleet, workers, uplink) = given.config, given.resources
    if strategy is not None:
        config = override(config, strategy=strategy)
    samples = given.samples
    at_server = config.strategy.strategy == "centralized"
    if at_server:  # it trains on all samples
        if config.data.partition == "views":
            raise UserError(
                "partition: views is not allowed in a plan of centralized, whose one "
                "network takes whole samples; allowed are the others"
            )
        fleet = Fleet((fleet.server,), fleet.server)
        samples = samples.sum(keepdims=True)
    batch_size = min(config.run.batch_size, int(samples.max()))
    steps = -(-samples // batch_size)
    most = int(steps.max())
    federation = given.federation._replace(
        groups=group_clients(Client(i, 1) for i in range(len(fleet.clients)))
    )
    traffic = _traffic(config, federation)
    some = _make(config, _with_cuts(federation, list(traffic)[:1]))
    check_one_copy(config, some)
    detached = some.boundary == "detached" and not some.waits
    if fleet.clusters:
        _check_clusters(config, detached=detached)
    slots = optimizer_slots(federation.optimizer)
    clusters = _pipelines(fleet, given.costs, batch_size, slots)
    return Problem(
        costs=given.costs,
        traffic=traffic,
        devices=_devices(fleet, given.costs, clusters, batch_size),
        server=fleet.server,
        schedule=schedule_of(some, most, first_average(some, most)),
        schedule_in=partial(schedule_of, some, most),
        steps=steps,
        batch_size=batch_size,
        slots=slots,
        micro_batches=config.run.micro_batches if detached else 1,
        workers=workers,
        at_server=at_server,
        uplink_bytes_per_s=uplink,
        gradient_share=some.gradient_share,
        one_cut=_needs_one_cut(config, federation, list(traffic)),
        clusters=clusters,
    )


def _check_clusters(config: Config, *, detached: bool) -> None:
    """Refuse what does not fit clients that are clusters."""
    if not detached:
        raise UserError(
            f"devices: a cluster does not fit the strategy {config.strategy.strategy}; "
            "allowed are those with a detached boundary, and without distill"
        )
    if config.clients.exits != "cut":
        raise UserError(
            f"exits: {config.clients.exits} is not allowed with a cluster; allowed is "
            "cut"
        )


def _pipelines(
    fleet: Fleet, costs: tuple[LayerCost, ...], batch_size: int, slots: int
) -> dict[int, Pipelines]:
    """Return the best pipelines of each client that is a cluster."""
    return {
        cluster.client: best_pipelines(
            costs, cluster.devices, batch_size=batch_size, slots=slots
        )
        for cluster in fleet.clusters
    }


def _devices(
    fleet: Fleet,
    costs: tuple[LayerCost, ...],
    clusters: dict[int, Pipelines],
    batch_size: int,
) -> tuple[Device, ...]:
    """Return the device of each client, a cluster as one device."""
    return tuple(
        cluster_device(device.name, costs, clusters[client], batch_size=batch_size)
        if client in clusters
        else device
        for client, device in enumerate(fleet.clients)
    )


def config_with_plans(config: Config, resources: Resources, every: int) -> Config:
    """Return a configuration with cuts that are planned again every few rounds.

    Clients whose batteries are empty are absent from then on.

    Args:
      config: of the run; the devices set its number of clients.
      resources: a device for each client, and the server.
      every: the rounds for which a plan holds.

    Raises:
      UserError: see `plan_rounds`; or nobody is present in a round.
    """
    problem = problem_of(planning(config, resources))
    count, rounds = len(problem.devices), config.run.rounds
    config = override(config, cuts=("1",), num_clients=count)
    attendance_of(config).check(_groups(config), rounds)
    plan = plan_rounds(
        problem, rounds=rounds, every=every, present=partial(_present, config)
    )
    cuts = dict(zip(plan.starts, plan.cuts.tolist(), strict=True))
    config = with_schedule(config, CutSchedule.of(cuts))
    absent = tuple(
        f"{i}:{last + 1}-{rounds}"
        for i, last in enumerate(plan.last_round.tolist())
        if last < rounds
    )
    return override(config, absences=(*config.clients.absences, *absent))


def _present(config: Config, number: int) -> Bools:
    """Return which clients take part in a round, ``bool [N]``; rounds count from 1."""
    who = attendance_of(config).present(_groups(config), number - 1)
    return np.isin(range(config.clients.num_clients), list(who))


def _groups(config: Config) -> tuple[Group, ...]:
    """Return all clients as one group; who takes part does not depend on the cuts."""
    return (Group(1, tuple(range(config.clients.num_clients))),)


def _make(config: Config, federation: Federation) -> Strategy:
    strategy = build_strategy(config, federation)
    if strategy.junction is not None:
        raise UserError(
            f"strategy: {config.strategy.strategy} is not planned yet, as its server "
            "takes all clients' views as one; allowed are the others"
        )
    return strategy


def _with_cuts(federation: Federation, cuts: list[int]) -> Federation:
    """Deal some cuts to the clients in turn."""
    clients = (Client(i, cuts[i % len(cuts)]) for i, _ in federation.clients)
    return federation._replace(groups=group_clients(clients))


def _traffic(config: Config, federation: Federation) -> dict[int, Traffic]:
    """Return the traffic of each cut that the algorithm takes, by the cut."""
    found: dict[int, Traffic] = {}
    for cut in range(1, len(federation.model.stages) + 1):
        try:
            _make(config, _with_cuts(federation, [cut]))
        except UserError as error:
            refusal = error
            continue
        found |= traffic_by_cut(federation, lambda f: _make(config, f), [cut])
    if not found:
        raise refusal
    return found


def _needs_one_cut(config: Config, federation: Federation, cuts: list[int]) -> bool:
    """Return whether the algorithm refuses clients with different cuts."""
    if len(cuts) == 1 or len(federation.clients) == 1:
        return True
    try:
        _make(config, _with_cuts(federation, cuts[:2]))
    except UserError:
        return True
    return False


def _samples(config: Config) -> Ints:
    """Return the training samples of each client, ``int64 [N]``."""
    data = config.data
    count = TRAIN_SAMPLES.get(data.dataset)
    if data.partition in _WITHOUT_LABELS and count is not None:
        labels = np.zeros(min(count, data.max_train_samples or count), np.int32)
    else:
        labels = build_data(dataclasses.replace(data, max_test_samples=1))[0].labels
    parts, _ = deal_labels(config, labels)
    return np.array([len(part) for part in with_labels(config, parts)])
