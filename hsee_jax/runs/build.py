"""From a `Config` to the objects of a run.

`hsee_jax.runs.model` makes the network, `hsee_jax.runs.data` and
`hsee_jax.runs.material` the data.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from hsee_jax.algorithms.registry import ALGORITHMS
from hsee_jax.config.schema import Config
from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Key
from hsee_jax.data import DatasetInfo
from hsee_jax.data.partition import Indices
from hsee_jax.data.pipeline import AUGMENTATIONS, InputPipeline
from hsee_jax.engine.host_store import HostStore
from hsee_jax.engine.placement import place_data
from hsee_jax.engine.plan import num_slots, steps_per_round
from hsee_jax.engine.refit import check_exits
from hsee_jax.engine.round import client_axis
from hsee_jax.engine.store import DeviceStore, Store
from hsee_jax.federation.accumulation import check_micro_batches
from hsee_jax.federation.federation import (
    Client,
    Federation,
    Group,
    group_clients,
)
from hsee_jax.federation.schedule import CutSchedule
from hsee_jax.federation.strategy import Strategy
from hsee_jax.nn.cuts import deal_cuts
from hsee_jax.nn.pretrained import load_pretrained
from hsee_jax.optim.optimizers import OPTIMIZERS, Optimizer
from hsee_jax.optim.schedules import make_schedule
from hsee_jax.parallel.mesh import SAME, backend_of, make_mesh, to_devices
from hsee_jax.runs.attendance import check_equal_periods, checked_attendance
from hsee_jax.runs.compilers import make_compilers
from hsee_jax.runs.cut_schedule import schedule_of
from hsee_jax.runs.data import OwnData, config_for, data_source
from hsee_jax.runs.experiment import Cadence, Experiment
from hsee_jax.runs.material import Material, deal, take
from hsee_jax.runs.model import build_codec, build_model, views_in
from hsee_jax.runs.private import check_simulated
from hsee_jax.runs.unlabelled import copies_of
from hsee_jax.systems.traffic import traffic_of

_INIT, _AUGMENT = range(2)  # streams of random keys


def build_optimizer(config: Config) -> Optimizer:
    """Build the optimizer that a configuration names, at rate 1."""
    return OPTIMIZERS.make(config.optim.optimizer, options=config.optim.options)


def build_federation(
    config: Config, info: DatasetInfo, mesh: Mesh | None = None, *, plain: bool = False
) -> Federation:
    """Build the clients that a configuration describes, and their network.

    Args:
      config: of the run.
      info: on its data.
      mesh: see `Federation`.
      plain: see `build_model`.

    Raises:
      UserError: the cuts do not fit the network or the clients, or there are more link
        rates than clients.
    """
    clients = config.clients
    model = build_model(config, info, mesh, plain=plain)
    cuts = deal_cuts(clients.cuts, clients.num_clients, model.layer_names)
    return Federation(
        model,
        group_clients(Client(i, cut) for i, cut in enumerate(cuts)),
        build_optimizer(config),
        mesh,
        build_codec(clients),
        config.run.micro_batches,
        one_by_one=config.run.client_axis == "map",
        exits=clients.exits,
    )


def build_strategy(config: Config, federation: Federation) -> Strategy:
    """Build the strategy that a configuration names.

    Raises:
      UserError: the strategy is not made for such a federation.
    """
    name, options = config.strategy.strategy, config.strategy.options
    strategy = ALGORITHMS.make(name, federation, options=options)
    if strategy.junction is not None:
        for field, allowed in (("partition", "views"), ("labelled_share", 1)):
            if (value := getattr(config.data, field)) != allowed:
                raise UserError(
                    f"{field}: {value} is not allowed with {name}, which merges the "
                    f"views of one event; allowed is {allowed}"
                )
    return strategy


def build(config: Config, data: OwnData | None = None) -> Experiment:
    """Load the data and build a run; no files are written.

    Args:
      config: the run.
      data: ``(x, y, x_test, y_test)``, or training and test set, to train on these
        arrays instead of the dataset of the configuration, which is then ``arrays``;
        see `hsee_jax.data.arrays` for types and shapes. Or a `DataSource`.

    Raises:
      UserError: the configuration does not fit the data, the network or the devices.
    """
    config = config_for(config, data)
    check_simulated(config)
    axis = _axis(config)
    info, read = data_source(config.data, data)
    mesh = None if axis == "loop" else make_mesh()

    def material(groups: Sequence[Group], strategy: Strategy) -> Material:
        copies = copies_of(config, strategy)
        return deal(config, info, groups, *read(), copies=copies)

    return assemble(config, info, material, axis=axis, mesh=mesh)


def assemble(
    config: Config,
    info: DatasetInfo,
    material: Callable[[Sequence[Group], Strategy], Material],
    *,
    axis: str,
    mesh: Mesh | None = None,
) -> Experiment:
    """Build a run from its configuration and its samples.

    Args:
      config: the run.
      info: on its data.
      material: reads the samples, and deals them to clients as a strategy needs them.
      axis: see `hsee_jax.engine.make_round`.
      mesh: of the devices that share the clients.

    Raises:
      UserError: see `build`.
    """
    pipeline, federation = build_pipeline(config, info), _start(config, info, mesh)
    strategy = build_strategy(config, federation)
    cadence = _cadence(config, federation)
    attendance = checked_attendance(config, federation)
    parts, shares, test, train, held = material(federation.groups, strategy)
    key, shards = augment_key(config), dict(enumerate(parts))
    batch_size = _batch_size(config, strategy, parts)
    check_equal_periods(config, federation, strategy, parts, batch_size)
    eval_batch_size = min(config.run.eval_batch_size, len(test.labels))
    slots, store = make_store(config, federation, strategy)
    placed, placed_shards = place_data(federation, strategy, slots, train, shards)
    compilers = make_compilers(config.run, pipeline, key, axis, mesh, eval_batch_size)
    return Experiment(
        config=config,
        info=info,
        pipeline=pipeline,
        federation=federation,
        strategy=strategy,
        manifest=shares,
        test=to_devices(test, mesh, SAME),
        validation=take(train, held, mesh) if train and len(held) else None,
        train=placed,
        shards=placed_shards,
        slots=slots,
        attendance=attendance,
        cadence=cadence,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        init_key=_key(config.run.model_seed, _INIT),
        stop_on_nonfinite=config.clients.on_nonfinite == "stop",
        plain_model=build_model(config, info, plain=True),
        traffic=traffic_of(federation, strategy, store.checkpoint_shapes()),
        store=store,
        learning_rates=build_rates(config, steps_per_round(shards, batch_size)),
        round_fn=compilers.make_round(strategy),
        evaluate_fn=compilers.make_evaluation(federation, strategy),
        schedule=_schedule(config, federation),
        compilers=compilers,
    )


def _start(config: Config, info: DatasetInfo, mesh: Mesh | None) -> Federation:
    """Build the clients, with a network that starts from weights in a file, if any."""
    federation = build_federation(config, info, mesh)
    path = config.model.pretrained
    if path is None:
        return federation
    return federation._replace(model=load_pretrained(federation.model, path))


def _axis(config: Config) -> str:
    axis = client_axis(config.run.client_axis, backend_of(None))
    if axis == "loop" and jax.process_count() > 1:
        raise UserError("client_axis: loop is not allowed with several processes")
    return axis


def _schedule(config: Config, federation: Federation) -> CutSchedule:
    """Return the cuts in every round; refuse those that the algorithm does not take."""
    schedule = schedule_of(config, federation.model.layer_names)
    if len(schedule.cuts) > 1 and jax.process_count() > 1:
        raise UserError("recuts: not allowed with several processes")
    if len(schedule.cuts) > 1 and federation.exits != "cut":
        raise UserError(f"recuts: not allowed with exits {federation.exits}")
    for cuts in schedule.cuts[1:]:
        if build_strategy(config, federation.with_cuts(cuts)).junction is not None:
            name = config.strategy.strategy
            raise UserError(f"recuts: not allowed with {name}, which has one cut")
    return schedule


def _batch_size(config: Config, strategy: Strategy, parts: Sequence[Indices]) -> int:
    """Return the samples in a step, no more than the largest share has."""
    batch_size = min(config.run.batch_size, max(map(len, parts)))
    check_micro_batches(
        config.run.micro_batches, batch_size, strategy.boundary, strategy.distill
    )
    return batch_size


def augment_key(config: Config) -> Key:
    """Return the root of the draws of a run's augmentation."""
    return _key(config.run.data_seed, _AUGMENT)


def _key(seed: int, stream: int) -> Key:
    return jax.random.fold_in(jax.random.key(seed), stream)


def _cadence(config: Config, federation: Federation) -> Cadence:
    run = config.run
    if run.refit_exits_every:
        if jax.process_count() > 1:
            raise UserError("refit_exits_every: is not allowed with several processes")
        check_exits(federation)
    every = run.eval_every, run.checkpoint_every, run.keep_checkpoints
    return Cadence(run.rounds, *every, run.refit_exits_every)


def build_pipeline(config: Config, info: DatasetInfo) -> InputPipeline:
    """Build what makes batches of samples, and refuse samples that it cannot take."""
    augment = AUGMENTATIONS.make(config.data.augment, options=config.data.options)
    views = views_in(config, info)
    pipeline = InputPipeline(info.mean, info.std, augment, views.take)
    pipeline.check(views.shape)
    return pipeline


def build_rates(config: Config, steps: int) -> npt.NDArray[np.float32]:
    """Compute the rate of each step, ``float32 [rounds, T]``."""
    optim, rounds = config.optim, config.run.rounds
    rates = make_schedule(
        optim.schedule,
        learning_rate=optim.learning_rate,
        warmup_steps=round(optim.warmup_rounds * steps),
        total_steps=rounds * steps,
        options=optim.options,
    )
    return rates(np.arange(rounds * steps)).reshape(-1, steps)


def make_store(
    config: Config, federation: Federation, strategy: Strategy
) -> tuple[tuple[int, ...], Store]:
    """Choose where the clients' state is kept; return each group's slots, too."""
    # Several processes have no host that could keep the state of all clients.
    on_host = config.clients.participation < 1 and jax.process_count() == 1
    on_host = on_host and strategy.junction is None  # a view has its place in the stack
    slots = num_slots(
        federation.groups,
        participation=config.clients.participation if on_host else 1.0,
        seed=config.run.data_seed,
        rounds=config.run.rounds,
        multiple=1 if federation.mesh is None else federation.mesh.size,
    )
    return slots, (HostStore if on_host else DeviceStore)(federation, strategy, slots)
