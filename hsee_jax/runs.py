"""A run in a folder: train, resume, reopen, evaluate.

The folder holds ``config.json``, ``data.json`` (the `DatasetInfo`), ``partition.json``
(each client's `Share` of the training set), ``metrics.jsonl`` (an object a round),
``summary.json`` (the final figures) and ``checkpoints/``.
"""

import json
import logging
import math
import platform
import shutil
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from hsee_jax.base import (
    DivergenceError,
    ExitMetrics,
    Metrics,
    Stopped,
    UserError,
)
from hsee_jax.checkpoint import Checkpoint, Writer, find, load
from hsee_jax.config import Config, override, to_json
from hsee_jax.engine import Progress, all_finite
from hsee_jax.evaluate import ClientResult, means
from hsee_jax.experiment import Experiment, build, dataset_info_of
from hsee_jax.federation import RunState
from hsee_jax.folder import (
    Record,
    check_info,
    check_partition,
    check_same,
    check_start,
    locked,
    read_config,
    replace_file,
    writing,
)
from hsee_jax.plan import EMPTY, RoundPlan
from hsee_jax.processes import in_first, is_first
from hsee_jax.restored import checkpoint_of

_log = logging.getLogger(__name__)


def train(
    config: Config,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_round: Callable[[Record], None] = lambda record: None,
    stop: Callable[[], bool] = lambda: False,
) -> Record:
    """Trains to the end and writes the run's folder.

    Of several processes all call this with the same arguments; the folder must be one
    that they share. The first writes the logs, all of them the checkpoints.

    Args:
      config: the run. With ``resume`` it must be the folder's own, but for `rounds`
        (which stretches the schedule of the learning rate from here on), `data_dir`
        and the bookkeeping.
      folder: of the run; it must not exist, or be empty, unless one of these is set:
      resume: go on from the last checkpoint.
      overwrite: replace the run in the folder.
      on_round: called with what is written to ``metrics.jsonl``.
      stop: asked between steps, in every process; true ends the run there, with a
        checkpoint.

    Returns:
      The content of ``summary.json``.

    Raises:
      UserError: the configuration, the data or the folder do not allow it; the folder
        is as it was.
      DivergenceError: see `Experiment.run_round`; the last checkpoint is a good one.
      Stopped: by ``stop``.
    """
    begin = time.perf_counter()
    check = partial(check_start, folder, resume=resume, overwrite=overwrite)
    in_first(check)
    if resume:
        check_same(config, read_config(folder))
    experiment = build(config)
    with locked(folder):
        in_first(check)
        place = (
            _Place(experiment.init()) if not resume else _resumed(experiment, folder)
        )
        in_first(partial(_start_folder, folder, experiment, place))
        begin -= place.wall_seconds
        return _train(experiment, folder, place, on_round, stop, begin)


class _Place(NamedTuple):
    """Where training begins."""

    state: Any
    records: tuple[Record, ...] = ()  # of the rounds done
    begun: Progress | None = None  # of the next one
    seconds: float = 0.0  # that it has taken in training
    wall_seconds: float = 0.0  # and in all
    checkpoint: Checkpoint | None = None


def _train(
    experiment: Experiment,
    folder: Path,
    place: _Place,
    on_round: Callable[[Record], None],
    stop: Callable[[], bool],
    begin: float,
) -> Record:
    """The loop of `train`, called at ``begin``, in a folder that is ready."""
    config = experiment.config
    stored = {"config": json.loads(to_json(config))}
    state, begun, before = place.state, place.begun, place.seconds
    records = list(place.records)
    results: list[ClientResult] = []
    with Writer(
        folder / "checkpoints",
        keep=config.run.keep_checkpoints,
        after=place.checkpoint,
    ) as checkpoints:
        if len(records) == config.run.rounds:  # resumed when all was done
            results = experiment.evaluate(state, experiment.test)
        while len(records) < config.run.rounds:
            start = time.perf_counter()
            state, plan, progress = experiment.run_round(state, begun, stop)
            jax.block_until_ready(state)
            seconds = before + time.perf_counter() - start
            if not progress.finished:
                wall_seconds = time.perf_counter() - begin
                notes = stored | _midway(plan, progress, seconds, wall_seconds)
                settled = experiment.store.settled(state)
                checkpoints.save(len(records), progress.steps, settled, notes)
                raise Stopped(len(records), progress.steps)
            begun, before = None, 0.0
            number = len(records) + 1
            last = number == config.run.rounds
            stopped = not last and stop()
            save = last or stopped or number % config.run.checkpoint_every == 0
            record = _record(number, plan, progress.metrics, seconds)
            record["link"] = experiment.crossed(number, progress.metrics)._asdict()
            if save or number % config.run.eval_every == 0:
                results = experiment.evaluate(state, experiment.test)
                _check_results(results, config, round=number)
                record["test"] = _scores(results)
            record["wall_seconds"] = time.perf_counter() - begin
            begin = time.perf_counter()
            records.append(record)
            if is_first():
                with writing(folder / "metrics.jsonl") as path, path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            on_round(record)
            if save:
                notes = stored | {"score": means(results)[1]}
                settled = experiment.store.settled(state)
                checkpoints.save(number, 0, settled, notes)
            if stopped:
                raise Stopped(number, 0)
    summary = _summary(config, results, records)
    summary["link"] = experiment.link_summary(records)
    if is_first():
        replace_file(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def reopen(
    folder: Path, which: str = "latest", *, data_dir: str | None = None
) -> tuple[Experiment, RunState]:
    """Composes a run's experiment again and reads its state.

    Args:
      folder: of the run.
      which: see `restore`.
      data_dir: where the data are, if not where they were.

    Raises:
      UserError: there is no such run, it has no checkpoint, or its data are gone, or
        others.
    """
    config = read_config(folder)
    if data_dir is not None:
        config = override(config, data_dir=data_dir)
    check_info(folder, dataset_info_of(config.data))
    checkpoint = checkpoint_of(folder, which)
    experiment = build(config)
    return experiment, load(checkpoint, experiment.store.like())


def evaluate(
    folder: Path, which: str = "latest", *, data_dir: str | None = None
) -> Record:
    """The figures of a checkpoint, as ``summary.json`` has them; see `reopen`."""
    experiment, state = reopen(folder, which, data_dir=data_dir)
    results = experiment.evaluate(experiment.store.adopted(state), experiment.test)
    return {"rounds": int(state.round), **_scores(results)}


def _resumed(experiment: Experiment, folder: Path) -> _Place:
    checkpoint = find(folder / "checkpoints", midway=True)
    if checkpoint is None:
        _log.warning("%s has no checkpoint; the run begins anew", folder)
        return _Place(experiment.init())
    rounds = experiment.config.run.rounds
    if rounds < checkpoint.rounds + (checkpoint.steps > 0):
        raise UserError(
            f"rounds: {rounds} is not allowed with --resume; the run has done "
            f"{checkpoint.rounds}{' and a part' if checkpoint.steps else ''}"
        )
    check_info(folder, dataset_info_of(experiment.config.data))
    check_partition(folder, experiment.manifest)
    state = load(checkpoint, experiment.store.like())
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines()
        records = [json.loads(line) for line in lines[: checkpoint.rounds]]
    except (OSError, ValueError) as error:
        raise UserError(f"run: {path} cannot be read: {error}") from error
    if len(records) < checkpoint.rounds:
        raise UserError(
            f"run: {path} has {len(records)} lines for {checkpoint.rounds} rounds"
        )
    place = _Place(
        experiment.store.adopted(state), tuple(records), checkpoint=checkpoint
    )
    if checkpoint.steps == 0:
        return place
    seconds, wall_seconds = (checkpoint.notes[n] for n in ("seconds", "wall_seconds"))
    begun = _begun(experiment.plan(checkpoint.rounds), checkpoint)
    return place._replace(begun=begun, seconds=seconds, wall_seconds=wall_seconds)


def _midway(
    plan: RoundPlan, progress: Progress, seconds: float, wall_seconds: float
) -> Record:
    """What a checkpoint in the middle of a round notes."""
    return {
        "seconds": seconds,
        "wall_seconds": wall_seconds,
        "ids": plan.ids.tolist(),
        "metrics": [[sums.tolist() for sums in branch] for branch in progress.metrics],
    }


def _begun(plan: RoundPlan, checkpoint: Checkpoint) -> Progress:
    """How far a round had come, with each client's sums in the slot it has now."""
    notes: Any = checkpoint.notes
    seats = {i: n for n, i in enumerate(notes["ids"]) if i != EMPTY}

    def moved(sums: list[float]) -> npt.NDArray[np.float64]:
        ids = plan.ids.tolist()
        return np.array([sums[seats[i]] if i in seats else 0.0 for i in ids])

    metrics = ExitMetrics(*(Metrics(*map(moved, sums)) for sums in notes["metrics"]))  # type: ignore[arg-type]
    return Progress(checkpoint.steps, False, metrics)


def _start_folder(folder: Path, experiment: Experiment, place: _Place) -> None:
    """Leaves what a run has to the place where it begins, and nothing else.

    The configuration comes first: with it alone a run can be resumed.
    """
    if place.checkpoint is None:
        for derived in ("checkpoints", "report", "gate", "export"):
            shutil.rmtree(folder / derived, ignore_errors=True)
    (folder / "summary.json").unlink(missing_ok=True)
    replace_file(folder / "config.json", to_json(experiment.config) + "\n")
    info = dataset_info_of(experiment.config.data)
    replace_file(folder / "data.json", json.dumps(info._asdict(), indent=2) + "\n")
    lines = "".join(json.dumps(record) + "\n" for record in place.records)
    replace_file(folder / "metrics.jsonl", lines)
    shares = [share._asdict() for share in experiment.manifest]
    replace_file(
        folder / "partition.json", json.dumps(shares, separators=(",", ":")) + "\n"
    )


def _check_results(results: list[ClientResult], config: Config, *, round: int) -> None:
    """Test losses that are not finite are a divergence, of one client or of all."""
    branches = [
        (result.id, name, np.isfinite(getattr(result, f"{name}_loss")))
        for name in ("exit", "server")
        for result in results
    ]
    diverged = [(i, name) for i, name, finite in branches if not finite]
    enough = 1 if config.clients.on_nonfinite == "stop" else len(results)
    if len({i for i, _ in diverged}) >= enough:
        raise DivergenceError(*diverged[0], round)


def _record(
    number: int, plan: RoundPlan, metrics: ExitMetrics, seconds: float
) -> Record:
    """What a round is remembered by; training figures are means over its samples.

    The samples of clients with a step that was refused are not among them.
    """
    fine = all_finite(metrics)
    count = np.sum(metrics.exit.count[fine])
    train = {
        f"{name}_{figure}": float(np.sum(total[fine]) / count)
        for name, branch in metrics._asdict().items()
        for figure, total in (("loss", branch.loss_sum), ("accuracy", branch.correct))
    }
    drawn = np.unique(plan.order)
    return {
        "round": number,
        "seconds": seconds,
        "images": int(np.sum(metrics.exit.count)),
        "missed": plan.ids[drawn][~plan.active[drawn]].tolist(),
        "left_out": plan.ids[~fine].tolist(),
        "train": train,
    }


def _scores(results: list[ClientResult]) -> Record:
    exit_mean, server_mean = means(results)
    return {
        "mean_exit_accuracy": exit_mean,
        "mean_server_accuracy": server_mean,
        "clients": [
            {name: _plain(value) for name, value in result._asdict().items()}
            for result in results
        ],
    }


def _plain(value: float) -> float | None:
    """A figure as JSON can hold it."""
    return value if math.isfinite(value) else None


def speed(records: list[Record]) -> Record:
    """How long the rounds of ``metrics.jsonl`` took."""
    seconds = [record["seconds"] for record in records]
    return {
        "wall_seconds": sum(record["wall_seconds"] for record in records),
        # the median round, so that compilation does not count
        "images_per_second": float(
            np.median([record["images"] for record in records]) / np.median(seconds)
        ),
    }


def _summary(
    config: Config, results: list[ClientResult], records: list[Record]
) -> Record:
    packages = ("hsee-jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "rounds": config.run.rounds,
        **_scores(results),
        **speed(records),
        # rounds of clients, over all of them
        **{
            f"{name}_rounds": sum(len(record[name]) for record in records)
            for name in ("missed", "left_out")
        },
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
    }
