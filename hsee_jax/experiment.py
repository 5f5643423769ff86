"""From a `Config` to everything that a run is composed of; no files are written."""

from typing import NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from hsee_jax.base import Array, Dataset, ExitMetrics, Key
from hsee_jax.config import Config
from hsee_jax.data import DATASETS, load_dataset
from hsee_jax.engine import InputPipeline, RoundFn, check_finite, make_round
from hsee_jax.evaluate import EvaluateFn, make_evaluation
from hsee_jax.model import Model, deal_cuts, resnet18
from hsee_jax.optim import make_optimizer, make_schedule
from hsee_jax.partition import partition
from hsee_jax.plan import plan_round, steps_per_round
from hsee_jax.strategies import (
    Client,
    Federation,
    RunState,
    Strategy,
    averaging,
    group_clients,
    sequential,
)

_INIT, _AUGMENT = range(2)  # streams of random keys


class Experiment(NamedTuple):
    """A run that is ready to start."""

    config: Config
    federation: Federation
    strategy: Strategy
    test: Dataset  # on the device
    train: Dataset  # on the device
    shards: dict[int, npt.NDArray[np.int32]]  # client id -> its training samples
    learning_rates: npt.NDArray[np.float32]  # [rounds, T]
    round_fn: RoundFn
    evaluate: EvaluateFn

    def init(self) -> RunState:
        """The state before the first round."""
        key = _key(self.config.run.model_seed, _INIT)
        return jax.jit(self.strategy.init)(key)

    def run_round(self, state: RunState) -> tuple[RunState, ExitMetrics]:
        """Trains the next round; the buffers of ``state`` are given up.

        Raises:
          DivergenceError: a loss is not finite.
        """
        config, groups = self.config, self.federation.groups
        round = int(state.round)
        plan = plan_round(
            groups,
            self.shards,
            batch_size=config.run.batch_size,
            participation=config.clients.participation,
            turn=self.strategy.turn_unit,
            seed=config.run.data_seed,
            round=round,
        )
        ids = [i for group in groups for i in group.ids]
        uniform = config.strategy.weights == "uniform"
        weights = [1.0 if uniform else float(len(self.shards[i])) for i in ids]
        state, metrics = self.round_fn(
            state,
            self.train,
            plan,
            self.learning_rates[round],
            np.asarray(weights, np.float32) * plan.active,
        )
        check_finite(groups, metrics, round=round + 1)
        return state, metrics


def _key(seed: int, stream: int) -> Key:
    return jax.random.fold_in(jax.random.key(seed), stream)


def build_model(config: Config) -> Model:
    """The network that a configuration describes."""
    info = DATASETS[config.data.dataset]
    return resnet18(
        num_classes=info.num_classes,
        input_shape=info.input_shape,
        width=config.model.width,
        stem=config.model.stem,
        exit_head=config.model.exit_head,
        dtype=config.model.dtype,
    )


def build_strategy(config: Config, federation: Federation) -> Strategy:
    """The strategy that a configuration names."""
    options = config.strategy
    if options.strategy == "sequential":
        return sequential(
            federation,
            turn=options.turn,
            server_lr_scale=options.server_lr_scale,
            init=config.clients.init,
        )
    return averaging(
        federation,
        period=options.period,
        period_unit=options.period_unit,
        average=options.average,
        batch_norm=options.batch_norm,
        optimizer_state=options.optimizer_state,
        server_lr_scale=options.server_lr_scale,
        init=config.clients.init,
    )


def build(config: Config, data: tuple[Dataset, Dataset] | None = None) -> Experiment:
    """Loads the data and composes the run.

    Args:
      config: the run.
      data: training and test samples to use instead of loading them; shapes and
        normalisation are those of ``config.data.dataset``.

    Raises:
      UserError: the configuration does not fit the data or the network.
    """
    model = build_model(config)
    cuts = deal_cuts(config.clients.cuts, config.clients.num_clients, model.layer_names)
    federation = Federation(
        model,
        group_clients(Client(i, cut) for i, cut in enumerate(cuts)),
        make_optimizer(config.optim),
    )
    strategy = build_strategy(config, federation)
    train, test = data or load_dataset(config.data)
    shards = dict(enumerate(partition(train.labels, config)))
    steps = steps_per_round(shards, config.run.batch_size)
    schedule = make_schedule(
        config.optim, num_rounds=config.run.rounds, steps_per_round=steps
    )
    global_steps = np.arange(config.run.rounds * steps, dtype=np.float32)
    rates: Array = jax.vmap(schedule)(global_steps)
    info = DATASETS[config.data.dataset]
    pipeline = InputPipeline(info.mean, info.std, config.data.augment)
    return Experiment(
        config=config,
        federation=federation,
        strategy=strategy,
        train=jax.device_put(train),
        test=jax.device_put(test),
        shards=shards,
        learning_rates=np.asarray(rates, np.float32).reshape(-1, steps),
        round_fn=make_round(
            strategy,
            federation.groups,
            pipeline,
            _key(config.run.data_seed, _AUGMENT),
            axis=config.run.client_axis,
        ),
        evaluate=make_evaluation(
            federation, strategy, pipeline, batch_size=config.run.eval_batch_size
        ),
    )
