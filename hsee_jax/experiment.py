"""From a `Config` to everything that a run is composed of; no files are written."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from hsee_jax.augment import InputPipeline
from hsee_jax.base import Array, Dataset, ExitMetrics, Key, UserError
from hsee_jax.config import Config, flatten, override, parse_absence
from hsee_jax.data import dataset_info, load_dataset
from hsee_jax.data.info import DatasetInfo
from hsee_jax.engine import (
    Progress,
    RoundFn,
    check_finite,
    client_axis,
    data_layout,
    make_round,
)
from hsee_jax.evaluate import ClientResult, EvaluateFn, make_evaluation
from hsee_jax.federation import (
    Client,
    Federation,
    Group,
    Strategy,
    group_clients,
    split,
)
from hsee_jax.mesh import SAME, make_mesh, place, place_blocks, processes
from hsee_jax.model import LayerCost, Model, deal_cuts, layer_costs, resnet18
from hsee_jax.optim import make_optimizer, make_schedule
from hsee_jax.partition import Share, hold_out, manifest, partition
from hsee_jax.plan import (
    EMPTY,
    Absence,
    RoundPlan,
    missing,
    num_slots,
    participants,
    plan_round,
    steps_per_round,
    take_seats,
)
from hsee_jax.store import DeviceStore, HostStore, Store
from hsee_jax.strategies import STRATEGIES, options_of
from hsee_jax.traffic import Bytes, Traffic, averages_in, by_cut, crossed, traffic_of

_INIT, _AUGMENT = range(2)  # streams of random keys
Shards = dict[int, npt.NDArray[np.int32]]  # client id -> its samples


class Experiment(NamedTuple):
    """A run that is ready to start."""

    config: Config
    federation: Federation
    strategy: Strategy
    manifest: list[Share]  # who has what of the training set
    test: Dataset  # on the devices
    validation: Dataset | None  # on the devices: training samples that were held out
    train: Dataset  # on the devices: all of them
    shards: Shards  # of ``train``
    slots: tuple[int, ...]  # of each group, in a round
    traffic: tuple[Traffic, ...]  # of a client of each group
    store: Store
    learning_rates: npt.NDArray[np.float32]  # [rounds, T]
    round_fn: RoundFn
    evaluate_fn: EvaluateFn

    def init(self) -> Any:
        """The state before the first round, in the form that the store keeps."""
        return self.store.init(_key(self.config.run.model_seed, _INIT))

    def plan(self, round: int) -> RoundPlan:
        """Who does what in a round, counted from 0."""
        config = self.config
        largest = max(map(len, self.shards.values()))  # more rows would be padding
        return plan_round(
            self.federation.groups,
            self.shards,
            batch_size=min(config.run.batch_size, largest),
            participation=config.clients.participation,
            turn=self.strategy.turn_unit,
            seed=config.run.data_seed,
            round=round,
            slots=self.slots,
            missing=_missing(config, round),
        )

    def run_round(
        self,
        state: Any,
        begun: Progress | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> tuple[Any, RoundPlan, Progress]:
        """Trains the next round; the buffers of ``state`` are given up.

        Args:
          state: before.
          begun: how much of the round has been done; None is nothing.
          stop: see `RoundFn`.

        Returns:
          The state, what the round was, and how far it has come.

        Raises:
          DivergenceError: the round has ended, and no client could take all of its
            steps, or, with `on_nonfinite`, one could not.
        """
        round = int(state.round)
        plan = self.plan(round)
        uniform = self.config.strategy.weights == "uniform"
        weights = [
            float(active and (uniform or len(self.shards[i])))
            for i, active in zip(plan.ids.tolist(), plan.active, strict=True)
        ]
        some, means, progress = self.round_fn(
            self.store.take(state, plan.ids),
            self.train,
            plan,
            self.learning_rates[round],
            np.array(weights, np.float32),
            begun,
            stop,
        )
        midway = not progress.finished
        if not midway:
            check_finite(
                plan,
                progress.metrics,
                round=round + 1,
                stop=self.config.clients.on_nonfinite == "stop",
            )
        state = self.store.put(state, plan.ids, some, means, midway=midway)
        return state, plan, progress

    def crossed(self, number: int, metrics: ExitMetrics) -> Bytes:
        """What crossed the links in a round, counted from 1, of these metrics."""
        steps = self.learning_rates.shape[1]
        counts = split(metrics.exit.count, self.slots)
        return crossed(self.traffic, counts, averages_in(self.strategy, number, steps))

    def link_summary(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What crossed the links in a whole run, and by cut those of one client.

        Args:
          records: of the rounds, as in ``metrics.jsonl``.
        """
        rounds, steps = self.learning_rates.shape
        averages = [averages_in(self.strategy, r + 1, steps) for r in range(rounds)]
        links = [record["link"] for record in records if "link" in record]
        return {
            **{name: sum(link[name] for link in links) for name in Bytes._fields},
            "cuts": by_cut(
                self.traffic,
                self.manifest,
                batch_size=self.config.run.batch_size,
                averages=float(np.mean(averages)),
            ),
        }

    def costs(self) -> tuple[LayerCost, ...]:
        """Of all layers and heads; FLOPs are of the convolution itself, in any form."""
        return layer_costs(build_model(override(self.config, conv="grouped")))

    def evaluate(self, state: Any, data: Dataset) -> list[ClientResult]:
        """Evaluates all clients on the whole of ``data``, which is on the devices."""
        return sorted(
            result
            for ids in self.store.chunks()
            for result in self.evaluate_fn(self.store.take(state, ids), data, ids)
        )


def _missing(config: Config, round: int) -> set[int]:
    """The clients that miss a round, counted from 0."""
    clients = config.clients
    return missing(
        range(clients.num_clients),
        dropout=clients.dropout,
        absences=[Absence(*parse_absence(text)) for text in clients.absences],
        seed=config.run.data_seed,
        round=round,
    )


def _check_attendance(config: Config, groups: Sequence[Group]) -> None:
    """Refuses a run with a round in which no client takes part."""
    if config.clients.dropout == 0 and not config.clients.absences:
        return
    for round in range(config.run.rounds):
        drawn = participants(
            groups,
            participation=config.clients.participation,
            seed=config.run.data_seed,
            round=round,
        )
        if not drawn - _missing(config, round):
            raise UserError(
                f"dropout: {config.clients.dropout} is not allowed with these absences "
                f"and seeds; no client is left in round {round + 1}"
            )


def _key(seed: int, stream: int) -> Key:
    return jax.random.fold_in(jax.random.key(seed), stream)


def build_model(config: Config, info: DatasetInfo | None = None) -> Model:
    """The network that a configuration describes.

    Args:
      config: of the run.
      info: on its data; None looks it up.
    """
    info = info or dataset_info(config.data)
    return resnet18(
        num_classes=info.num_classes,
        input_shape=info.input_shape,
        width=config.model.width,
        stem=config.model.stem,
        exit_head=config.model.exit_head,
        dtype=config.model.dtype,
        conv=config.model.conv,
    )


def build_federation(
    config: Config, info: DatasetInfo, mesh: Mesh | None = None
) -> Federation:
    """The clients that a configuration describes, and their network.

    Args:
      config: of the run.
      info: on its data.
      mesh: see `Federation`.

    Raises:
      UserError: the cuts do not fit the network or the clients.
    """
    model = build_model(config, info)
    cuts = deal_cuts(config.clients.cuts, config.clients.num_clients, model.layer_names)
    return Federation(
        model,
        group_clients(Client(i, cut) for i, cut in enumerate(cuts)),
        make_optimizer(config.optim),
        mesh,
        config.clients.link,
    )


def build_strategy(config: Config, federation: Federation) -> Strategy:
    """The strategy that a configuration names, with the options that it reads.

    Raises:
      UserError: the federation is none that it is made for.
    """
    values = flatten(config)
    name = config.strategy.strategy
    return STRATEGIES[name](federation, **{o: values[o] for o in options_of(name)})


def build(config: Config, data: tuple[Dataset, Dataset] | None = None) -> Experiment:
    """Loads the data and composes the run.

    Args:
      config: the run.
      data: training and test set, on the host, if not those that the configuration
        names; of the same shape and labels.

    Raises:
      UserError: the configuration does not fit the data, the network or the devices.
    """
    axis = client_axis(config.run.client_axis)
    if axis == "loop" and jax.process_count() > 1:
        raise UserError("client_axis: loop is not allowed with several processes")
    info = dataset_info(config.data)
    mesh = make_mesh() if axis == "vmap" else None
    federation = build_federation(config, info, mesh)
    strategy = build_strategy(config, federation)
    _check_attendance(config, federation.groups)
    train, test = load_dataset(config.data) if data is None else data
    kept, held = hold_out(len(train.labels), config)
    parts = [kept[part] for part in partition(train.labels[kept], config)]
    cuts = {i: group.cut for group in federation.groups for i in group.ids}
    shares = manifest(
        parts,
        train.labels,
        cuts=[cuts[i] for i in range(len(cuts))],
        num_classes=info.num_classes,
    )
    shards = dict(enumerate(parts))
    validation = Dataset(*(a[held] for a in train)) if len(held) else None
    steps = steps_per_round(shards, config.run.batch_size)
    schedule = make_schedule(
        config.optim, num_rounds=config.run.rounds, steps_per_round=steps
    )
    global_steps = np.arange(config.run.rounds * steps, dtype=np.float32)
    rates: Array = jax.vmap(schedule)(global_steps)
    pipeline = InputPipeline(
        info.mean, info.std, config.data.augment, draws=config.run.batch_size
    )
    # Several processes have no host that could keep the state of all clients.
    on_host = config.clients.participation < 1 and jax.process_count() == 1
    slots = num_slots(
        federation.groups,
        participation=config.clients.participation if on_host else 1.0,
        seed=config.run.data_seed,
        rounds=config.run.rounds,
        multiple=1 if federation.mesh is None else federation.mesh.size,
    )
    train, shards = _place_data(federation, strategy, slots, train, shards)
    store = (HostStore if on_host else DeviceStore)(federation, strategy, slots)
    return Experiment(
        config=config,
        federation=federation,
        strategy=strategy,
        manifest=shares,
        train=train,
        validation=validation and place(validation, federation.mesh, SAME),
        test=place(test, federation.mesh, SAME),
        shards=shards,
        slots=slots,
        traffic=traffic_of(federation, strategy, store.like()),
        store=store,
        learning_rates=np.asarray(rates, np.float32).reshape(-1, steps),
        round_fn=make_round(
            strategy,
            pipeline,
            _key(config.run.data_seed, _AUGMENT),
            axis=axis,
            mesh=federation.mesh,
        ),
        evaluate_fn=make_evaluation(
            federation,
            strategy,
            pipeline,
            batch_size=min(config.run.eval_batch_size, len(test.labels)),
            axis=axis,
        ),
    )


def _place_data(
    federation: Federation,
    strategy: Strategy,
    slots: Sequence[int],
    train: Dataset,
    shards: Shards,
) -> tuple[Dataset, Shards]:
    """Puts on each device the samples that its process needs.

    One process: all of them. Several: those of the clients in the process's own slots;
    a client's shard then counts in its process's block.
    """
    mesh = federation.mesh
    if mesh is None or data_layout(strategy) == SAME:
        return place(train, mesh, SAME), shards
    if jax.process_count() == 1:
        return place_blocks(train, mesh), shards
    blocks: dict[int, list[int]] = {p: [] for p in range(jax.process_count())}
    homes = [p for count in slots for p in processes(mesh, count)]
    ids = take_seats(federation.groups, slots, set())
    moved: Shards = {}
    for i, process in zip(ids.tolist(), homes, strict=True):
        if i != EMPTY:
            first = len(blocks[process])
            moved[i] = np.arange(first, first + len(shards[i]), dtype=np.int32)
            blocks[process].extend(shards[i])
    own = np.resize(blocks[jax.process_index()] or [0], max(map(len, blocks.values())))
    return place_blocks(Dataset(*(a[own] for a in train)), mesh), moved
