"""Train a run in a folder, from its start or from its last checkpoint.

The folder holds ``config.json``, ``data.json`` (the `DatasetInfo`), ``partition.json``
(each client's `Share` of the training set), ``metrics.jsonl`` (a `RoundRecord` a line),
``summary.json`` (the `Summary`) and ``checkpoints/``.
"""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax

from hsee_jax.config.schema import Config
from hsee_jax.config.values import to_json
from hsee_jax.core.errors import DivergenceError, Stopped
from hsee_jax.engine.evaluation import ClientResult
from hsee_jax.engine.plan import RoundPlan
from hsee_jax.engine.round import RoundProgress
from hsee_jax.federation.ridge import RIDGE
from hsee_jax.parallel.processes import in_any, in_first
from hsee_jax.runs.build import build
from hsee_jax.runs.callbacks import Callback, Checkpoints, MetricsLog, Moment
from hsee_jax.runs.clock import with_clock
from hsee_jax.runs.data import OwnData, config_for
from hsee_jax.runs.equip import Devices, Given, Trace, equip
from hsee_jax.runs.experiment import Experiment
from hsee_jax.runs.folder import check_same, check_start, locked, read_config
from hsee_jax.runs.phases import Phases
from hsee_jax.runs.records import (
    Scores,
    Summary,
    link_of,
    round_record,
    summarize,
)
from hsee_jax.runs.start import (
    Start,
    config_to_build,
    midway_notes,
    prepare_folder,
    resume_from,
    warn_of_period,
)


def train(
    config: Config,
    folder: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    data: OwnData | None = None,
    devices: Devices | None = None,
    availability: Trace | None = None,
    callbacks: Sequence[Callback] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Summary:
    """Train to the end and write the run's folder.

    If there are several processes, all of them call this with the same arguments and a
    folder that they share. The first writes the logs; all write the checkpoints.

    Args:
      config: the run. With ``resume`` it must equal the folder's, except `rounds` (a
        change stretches the schedule of the learning rate from here on) and
        `hsee_jax.config.BOOKKEEPING`.
      folder: of the run, new or empty unless ``resume`` or ``overwrite`` is set.
      resume: go on from the last checkpoint.
      overwrite: replace the run in the folder.
      data: arrays to train on, see `build`; what reopens the run needs them again.
      devices: of the clients, for the simulated clock, see `Given`.
      availability: of the clients on that clock, see `Given`.
      callbacks: called after every round, behind the log and before the checkpoint.
      stop: called between steps, in every process; true ends the run with a
        checkpoint.

    Returns:
      The content of ``summary.json``.

    Raises:
      UserError: the configuration, the data or the folder do not allow it; the folder
        is as it was.
      DivergenceError: see `Experiment.run_round`; or test losses are not finite. The
        last checkpoint is a good one.
      Stopped: ``stop`` returned true.
    """
    config = config_for(config, data)

    def build_run() -> Experiment:
        given = Given(devices, availability)
        equipment = equip(config, given, resume=Path(folder) if resume else None)
        needed = config_to_build(config, Path(folder)) if resume else config
        experiment = build(needed, data)._replace(config=config)
        return with_clock(experiment, equipment)

    return train_built(
        build_run,
        config,
        folder,
        resume=resume,
        overwrite=overwrite,
        callbacks=callbacks,
        stop=stop,
    )


def train_built(
    build_run: Callable[[], Experiment],
    config: Config,
    folder: str | os.PathLike[str],
    *,
    resume: bool,
    overwrite: bool,
    callbacks: Sequence[Callback],
    stop: Callable[[], bool],
    journal: str | None = None,
) -> Summary:
    """Train a run that a function builds to its end; see `train` for what it raises.

    Args:
      build_run: builds the run, once the folder is known to allow it.
      config: its configuration.
      folder: see `train`, like all arguments but the last.
      resume: go on from the last checkpoint.
      overwrite: replace the run in the folder.
      callbacks: called after every round.
      stop: asked between steps.
      journal: the folder, in that of the run, of further checkpoints from which it may
        go on; each checkpoint is then complete before the next round.

    Returns:
      The content of ``summary.json``.
    """
    begin, folder = time.perf_counter(), Path(folder)
    Callback.check_all(callbacks)
    check = partial(check_start, folder, resume=resume, overwrite=overwrite)
    in_first(check)
    if resume:
        check_same(config, read_config(folder))
    experiment = build_run()
    phases = Phases(experiment)
    with locked(folder), ExitStack() as stack:
        in_first(check)
        if resume:
            start = resume_from(phases, folder, journal)
        else:
            start = Start(experiment.init())
        in_first(partial(prepare_folder, folder, experiment, start))
        keep = experiment.cadence.keep_checkpoints
        checkpoints = Checkpoints(
            folder, keep=keep, after=start.checkpoint, at_once=journal is not None
        )
        warn_of_period(experiment)
        others = (MetricsLog(folder), *callbacks)
        for callback in (*others, checkpoints):
            stack.enter_context(callback)
        since = begin - start.wall_seconds
        return _Loop(phases, start, others, checkpoints, stop, since).run()


class _Loop:
    """The rounds of a run, one after another."""

    def __init__(
        self,
        phases: Phases,
        start: Start,
        callbacks: Sequence[Callback],
        checkpoints: Checkpoints,
        stop: Callable[[], bool],
        begin: float,
    ) -> None:
        number = 1 if start.checkpoint is None else start.checkpoint.number
        self._phases, self._callbacks = phases, (*callbacks, checkpoints)
        self._checkpoints, self._stop_run = checkpoints, stop
        self._experiment, self._shelf = phases.at(number), start.shelf
        self._state, self._begun, self._before = start.state, start.begun, start.seconds
        self._records = list(start.records)
        self._begin = begin  # when the round began, on the clock of `perf_counter`
        self._results: list[ClientResult] | None = None  # of the last evaluation
        self._config = json.loads(to_json(self._experiment.config))

    def run(self) -> Summary:
        """Train to the end."""
        experiment = self._experiment
        for callback in self._callbacks:
            callback.on_start(experiment)
        while len(self._records) < experiment.cadence.rounds:
            self._round()
        results = self._results
        if results is None:  # it was resumed when all was finished
            results = experiment.evaluate(self._state, experiment.test)
        last = self._phases.at(experiment.cadence.rounds)
        summary = summarize(results, self._records, last.bytes_by_cut())
        for callback in reversed(self._callbacks):
            callback.on_end(summary)
        return summary

    def _stop(self) -> bool:
        """Name a checkpoint that is written; return whether to stop after a step."""
        self._checkpoints.seal_written()
        return in_any(bool(self._stop_run()))  # the processes stop together

    def _round(self) -> None:
        """Train a round, or the rest of one.

        Raises:
          Stopped: ``stop`` returned true.
        """
        start, experiment = time.perf_counter(), self._enter(len(self._records) + 1)
        self._state, plan, progress = experiment.run_round(
            self._state, self._begun, self._stop
        )
        jax.block_until_ready(self._state)
        seconds = self._before + time.perf_counter() - start
        if not progress.finished:
            self._pause(plan, progress, seconds)
        self._begun, self._before = None, 0.0
        number, cadence = len(self._records) + 1, experiment.cadence
        link = experiment.round_bytes(number, progress.metrics)
        if cadence.refits_after(number):
            self._state, exits = experiment.refit_exits(self._state, RIDGE)
            link = link.plus(link_of(exits))
        last = number == cadence.rounds
        stopped = not last and self._stop()
        planned = last or number % cadence.checkpoint_every == 0
        test = None  # a stop leaves the figures as they are without it
        if planned or number % cadence.eval_every == 0:
            results = self._results = experiment.evaluate(self._state, experiment.test)
            _check_results(results, experiment.stop_on_nonfinite, number=number)
            test = Scores.of(results)
        now = time.perf_counter()
        record = round_record(
            number,
            plan,
            progress.metrics,
            link,
            seconds=seconds,
            wall_seconds=now - self._begin,
            test=test,
            simulated=experiment.clock[number - 1] if experiment.clock else None,
        )
        self._begin = now
        self._records.append(record)
        score = None if test is None else test.mean_server_accuracy
        moment = self._moment(0, {"score": score}, due=planned or stopped)
        for callback in self._callbacks:
            callback.on_round(record, moment)
        if stopped:
            raise Stopped(number, 0)

    def _enter(self, number: int) -> Experiment:
        """Return the experiment of a round; move the layers if it has other cuts."""
        before, after = self._experiment, self._phases.at(number)
        if after is not before:
            self._state, self._shelf = self._phases.move(
                self._state, self._shelf, before, after
            )
            self._experiment = after
        return after

    def _pause(self, plan: RoundPlan, progress: RoundProgress, seconds: float) -> None:
        wall_seconds = time.perf_counter() - self._begin
        notes = midway_notes(plan, progress, seconds, wall_seconds)
        moment = self._moment(progress.steps, notes, due=True)
        for callback in self._callbacks:
            callback.on_pause(moment)
        raise Stopped(len(self._records), progress.steps)

    def _moment(self, steps: int, notes: dict[str, Any], *, due: bool) -> Moment:
        return Moment(
            len(self._records),
            steps,
            due,
            partial(self._experiment.store.to_checkpoint, self._state),
            {"config": self._config} | notes,
            self._shelf,
        )


def _check_results(
    results: Sequence[ClientResult], stop_at_one: bool, *, number: int
) -> None:
    """Refuse test losses that are not finite, of one client or of all."""
    diverged = [
        (result.id, name)
        for name in ("exit", "server")
        for result in results
        if not math.isfinite(getattr(result, f"{name}_loss"))
    ]
    enough = 1 if stop_at_one else len(results)
    if len({i for i, _ in diverged}) >= enough:
        raise DivergenceError(*diverged[0], number)
