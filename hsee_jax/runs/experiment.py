"""A run that is ready to start: its parts and its methods."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hsee_jax.config.schema import Config
from hsee_jax.config.values import flatten
from hsee_jax.core.types import Dataset, ExitMetrics, Key
from hsee_jax.data.info import DatasetInfo
from hsee_jax.data.partition import Share
from hsee_jax.data.pipeline import InputPipeline
from hsee_jax.engine.compilation import check_finite
from hsee_jax.engine.evaluation import ClientResult, EvaluateFn
from hsee_jax.engine.likeness import References
from hsee_jax.engine.placement import Shards
from hsee_jax.engine.plan import RoundPlan, plan_round
from hsee_jax.engine.refit import ExitFit, Samples, refit_exits
from hsee_jax.engine.round import RoundFn, RoundProgress
from hsee_jax.engine.store import Store
from hsee_jax.federation.federation import Federation
from hsee_jax.federation.schedule import CutSchedule
from hsee_jax.federation.strategy import Strategy
from hsee_jax.nn.model import Model
from hsee_jax.runs.attendance import Attendance
from hsee_jax.runs.compilers import Compilers
from hsee_jax.runs.equipment import Equipment
from hsee_jax.systems.clock import RoundClock
from hsee_jax.systems.costs import LayerCost, layer_costs
from hsee_jax.systems.traffic import (
    Bytes,
    Traffic,
    averages_in,
    bytes_by_cut,
    round_bytes,
)


class Cadence(NamedTuple):
    """The length of a run, and the rounds between evaluations and checkpoints."""

    rounds: int
    eval_every: int
    checkpoint_every: int
    keep_checkpoints: int
    refit_exits_every: int = 0  # rounds between exact fits of the exits; 0 is never

    def refits_after(self, number: int) -> bool:
        """Return whether the exits are fitted after a round; rounds count from 1."""
        return self.refit_exits_every > 0 and number % self.refit_exits_every == 0


class Experiment(NamedTuple):
    """A run that is ready to start."""

    config: Config  # as it is written to the run's folder
    info: DatasetInfo
    pipeline: InputPipeline  # makes the batches of a client
    federation: Federation
    strategy: Strategy
    manifest: list[Share]  # each client's share of the training set
    test: Dataset  # on the devices
    validation: Dataset | None  # the held-out training samples, on the devices
    train: Dataset  # all training samples, on the devices
    shards: Shards  # indices in ``train``
    slots: tuple[int, ...]  # the slots of each group in a round
    attendance: Attendance
    cadence: Cadence
    batch_size: int  # of a client's step
    eval_batch_size: int
    init_key: Key
    stop_on_nonfinite: bool  # end the run at a loss or gradient that is not finite
    plain_model: Model  # with the native convolution, see `build_model`
    traffic: tuple[Traffic, ...]  # of the clients of each group
    store: Store
    learning_rates: npt.NDArray[np.float32]  # [rounds, T]
    round_fn: RoundFn
    evaluate_fn: EvaluateFn
    schedule: CutSchedule  # this experiment has the cuts of one of its phases
    compilers: Compilers
    equipment: Equipment | None = None
    clock: tuple[RoundClock, ...] = ()  # of each round, see `with_clock`; or empty

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of the configuration by name, for logs and trackers."""
        return flatten(self.config)

    def init(self) -> Any:
        """Draw the state before the first round, in the form that the store keeps."""
        return self.store.init(self.init_key)

    def plan(self, number: int) -> RoundPlan:
        """Draw the plan of a round; rounds count from 0."""
        groups, attendance = self.federation.groups, self.attendance
        absent = attendance.missing(groups, number)
        if self.clock:
            absent |= {*self.clock[number].away, *self.clock[number].late}
        return plan_round(
            groups,
            self.shards,
            batch_size=self.batch_size,
            participation=attendance.participation,
            turn=self.strategy.turn_unit,
            seed=attendance.seed,
            number=number,
            slots=self.slots,
            missing=absent,
            one_draw=self.strategy.junction is not None,
        )

    def run_round(
        self,
        state: Any,
        begun: RoundProgress | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> tuple[Any, RoundPlan, RoundProgress]:
        """Train the next round; the call donates the buffers of ``state``.

        Args:
          state: the state before the round.
          begun: the progress of the round so far; None at its beginning.
          stop: see `RoundFn`.

        Returns:
          The new state, the plan of the round, and its progress.

        Raises:
          DivergenceError: the round has ended, and no client took all of its steps; or
            one client did not, and ``stop_on_nonfinite`` is set.
        """
        number = int(state.round)
        plan = self.plan(number)
        some, means, progress = self.round_fn(
            self.store.take(state, plan.ids),
            self.train,
            plan,
            self.learning_rates[number],
            self.weights(plan),
            begun,
            stop,
        )
        if progress.late:
            active = plan.active.copy()
            active[list(progress.late)] = False
            plan = plan._replace(active=active)
        midway = not progress.finished
        if not midway:
            check_finite(
                plan,
                progress.metrics,
                number=number + 1,
                stop=self.stop_on_nonfinite,
            )
        state = self.store.put(state, plan.ids, some, means, midway=midway)
        return state, plan, progress

    def weights(self, plan: RoundPlan) -> npt.NDArray[np.float32]:
        """Return the weight of each slot in the averages, ``float32 [N]``."""
        return np.where(plan.active, self.client_weights()[plan.ids], np.float32(0))

    def client_weights(self) -> npt.NDArray[np.float32]:
        """Return the weight of each client in a mean, ``float32 [N]`` by its id."""
        sizes = [len(self.shards[i]) for i in range(len(self.shards))]
        uniform = self.strategy.weights == "uniform"
        return np.array([1 if uniform else size for size in sizes], np.float32)

    def round_bytes(self, number: int, metrics: ExitMetrics) -> Bytes:
        """Return the bytes on all links in a round; rounds count from 1."""
        averages = averages_in(self.strategy, number, self.learning_rates.shape[1])
        return round_bytes(self.traffic, self.slots, metrics, averages)

    def bytes_by_cut(self) -> list[dict[str, Any]]:
        """Return the bytes on the link of one client of each cut.

        See `hsee_jax.systems.bytes_by_cut`.
        """
        rounds, steps = self.learning_rates.shape
        averages = [averages_in(self.strategy, r + 1, steps) for r in range(rounds)]
        return bytes_by_cut(
            self.traffic,
            self.manifest,
            batch_size=self.batch_size,
            averages=float(np.mean(averages)),
            gradient_share=self.strategy.gradient_share,
            labelled_only=self.strategy.copies > 1,
        )

    def costs(self) -> tuple[LayerCost, ...]:
        """Return the costs of all layers and heads, see `layer_costs`."""
        return layer_costs(self.plain_model, self.federation.exits)

    def evaluate(self, state: Any, data: Dataset) -> list[ClientResult]:
        """Evaluate all clients, by ascending id, on ``data`` on the devices."""
        references: References = {}
        return sorted(
            result
            for ids in self.store.chunks()
            for result in self.evaluate_fn(
                self.store.take(state, ids), data, ids, references
            )
        )

    def refit_exits(self, state: Any, ridge: float) -> tuple[Any, list[ExitFit]]:
        """Fit all exits exactly, see `hsee_jax.engine.refit_exits`."""
        samples = Samples(
            self.train,
            self.shards,
            self.pipeline,
            self.eval_batch_size,
            self.info.num_classes,
        )
        stored = self.store.to_checkpoint(state)
        stored, fits = refit_exits(self.federation, stored, samples, ridge)
        return self.store.from_checkpoint(stored), fits
