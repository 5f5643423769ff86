"""A run in a folder: train, resume, evaluate, restore.

The folder holds ``config.json``, ``partition.json`` (each client's `Share` of the
training set), ``metrics.jsonl`` (an object a round), ``summary.json`` (the final
figures) and ``checkpoints/``.
"""

import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hsee_jax.base import DivergenceError, ExitMetrics, Stopped, UserError
from hsee_jax.checkpoint import Checkpoints
from hsee_jax.config import Config, flatten, from_dict, override, to_json
from hsee_jax.evaluate import ClientResult, means
from hsee_jax.experiment import Experiment, build
from hsee_jax.federation import RunState
from hsee_jax.processes import in_first, is_first

Record = dict[str, Any]

# What --resume may change: the length, and what has no effect on the training.
_MAY_CHANGE = (
    "rounds",
    "data_dir",
    "eval_every",
    "eval_batch_size",
    "checkpoint_every",
    "keep_checkpoints",
    "client_axis",
)


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
      stop: asked after every round but the last, in every process; true ends the run
        there, with a checkpoint.

    Returns:
      The content of ``summary.json``.

    Raises:
      UserError: the configuration, the data or the folder do not allow it; the folder
        is as it was.
      DivergenceError: a loss is not finite; the last checkpoint is a good one.
      Stopped: by ``stop``.
    """
    since = time.perf_counter()
    in_first(partial(_check_folder, folder, resume=resume, overwrite=overwrite))
    if resume:
        _check_same(config, read_config(folder))
    experiment = build(config)
    records: list[Record] = []
    if resume:
        state, records = _resumed(experiment, folder)
    else:
        state = experiment.init()
    in_first(partial(_start_folder, folder, experiment, records))

    results: list[ClientResult] = []
    keep = config.run.keep_checkpoints
    with Checkpoints(folder / "checkpoints", keep=keep) as checkpoints:
        if len(records) == config.run.rounds:  # resumed when all was done
            results = experiment.evaluate(state, experiment.test)
        while len(records) < config.run.rounds:
            start = time.perf_counter()
            state, metrics = experiment.run_round(state)
            jax.block_until_ready(state)
            seconds = time.perf_counter() - start
            number = len(records) + 1
            last = number == config.run.rounds
            stopped = not last and stop()
            save = last or stopped or number % config.run.checkpoint_every == 0
            record = _record(number, metrics, seconds)
            record["link"] = experiment.crossed(number, metrics)._asdict()
            if save or number % config.run.eval_every == 0:
                results = experiment.evaluate(state, experiment.test)
                _check_results(results, round=number)
                record["test"] = _scores(results)
            record["wall_seconds"] = time.perf_counter() - since
            since = time.perf_counter()
            records.append(record)
            if is_first():
                with (folder / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(record) + "\n")
            on_round(record)
            if save:
                checkpoints.save(
                    number,
                    experiment.store.settled(state),
                    score=means(results)[1],
                    metadata={"config": json.loads(to_json(config))},
                )
            if stopped:
                raise Stopped(number)
    summary = _summary(config, results, records)
    summary["link"] = experiment.link_summary(records)
    if is_first():
        _replace(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def restore(
    folder: Path, which: str = "latest", *, data_dir: str | None = None
) -> tuple[Experiment, RunState]:
    """Composes a run's experiment again and reads its state.

    Args:
      folder: of the run.
      which: the ``"latest"`` checkpoint, or the ``"best"`` by mean server accuracy.
      data_dir: where the data are, if not where they were.

    Raises:
      UserError: there is no such run, it has no checkpoint, or its data are gone.
    """
    config = read_config(folder)
    if data_dir is not None:
        config = override(config, data_dir=data_dir)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        number = checkpoints.find(which)
        experiment = build(config)
        return experiment, checkpoints.restore(number, experiment.store.like())


def evaluate(
    folder: Path, which: str = "latest", *, data_dir: str | None = None
) -> Record:
    """The figures of a checkpoint, as ``summary.json`` has them; see `restore`."""
    experiment, state = restore(folder, which, data_dir=data_dir)
    results = experiment.evaluate(experiment.store.adopted(state), experiment.test)
    return {"rounds": int(state.round), **_scores(results)}


def read_config(folder: Path) -> Config:
    """The configuration of a run.

    Raises:
      UserError: there is no run in the folder.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"run: {folder} is not a run; allowed is a folder that `hsee train` wrote"
        )
    return load_config(path)


def load_config(path: Path) -> Config:
    """Reads a configuration file.

    Raises:
      UserError: it is not there, not JSON, or not a valid configuration.
    """
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"config: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"config: {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"config: {path} is not an object of sections")
    return from_dict(values)


def check_writable(folder: Path) -> None:
    """Looks whether a folder can be written to, or made.

    Raises:
      UserError: it cannot.
    """
    places = (folder, *folder.absolute().parents)
    nearest = next(place for place in places if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"out: {nearest} is not a folder that can be written to")


def _check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise UserError("resume: is not allowed together with overwrite")
    if resume:
        read_config(folder)
        return
    check_writable(folder)
    if not folder.exists() or not any(folder.iterdir()):
        return
    try:
        read_config(folder)
    except UserError as error:
        raise UserError(
            f"out: {folder} is neither empty nor a run; allowed is a new folder"
        ) from error
    if not overwrite:
        raise UserError(
            f"out: {folder} holds a run already; allowed is a new folder, or --resume "
            "to go on with it, or --overwrite to replace it"
        )


def _check_same(config: Config, stored: Config) -> None:
    theirs = flatten(stored)
    for name, value in flatten(config).items():
        if name not in _MAY_CHANGE and value != theirs[name]:
            raise UserError(
                f"{name}: {value} is not allowed with --resume; the run has "
                f"{theirs[name]}"
            )


def _resumed(experiment: Experiment, folder: Path) -> tuple[Any, list[Record]]:
    with Checkpoints(folder / "checkpoints") as checkpoints:
        number = checkpoints.find()
        rounds = experiment.config.run.rounds
        if rounds < number:
            raise UserError(
                f"rounds: {rounds} is not allowed with --resume; the run has done "
                f"{number}"
            )
        state = checkpoints.restore(number, experiment.store.like())
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines()
        records = [json.loads(line) for line in lines[:number]]
    except (OSError, ValueError) as error:
        raise UserError(f"run: {path} cannot be read: {error}") from error
    if len(records) < number:
        raise UserError(f"run: {path} has {len(records)} lines for {number} rounds")
    return experiment.store.adopted(state), records


def _start_folder(folder: Path, experiment: Experiment, records: list[Record]) -> None:
    """Leaves the run's beginning, the records, and with no records nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    if not records:
        for derived in ("checkpoints", "report"):
            shutil.rmtree(folder / derived, ignore_errors=True)
    (folder / "summary.json").unlink(missing_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    _replace(folder / "metrics.jsonl", lines)
    shares = [share._asdict() for share in experiment.manifest]
    _replace(
        folder / "partition.json", json.dumps(shares, separators=(",", ":")) + "\n"
    )
    _replace(folder / "config.json", to_json(experiment.config) + "\n")


def _replace(path: Path, text: str) -> None:
    """Writes a file at once or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _check_results(results: list[ClientResult], *, round: int) -> None:
    """A test loss that is not finite is a divergence of its branch."""
    for result in results:
        for branch in ("exit", "server"):
            if not np.isfinite(getattr(result, f"{branch}_loss")):
                raise DivergenceError(result.id, branch, round)


def _record(number: int, metrics: ExitMetrics, seconds: float) -> Record:
    """What a round is remembered by; training figures are means over its samples."""
    count = int(np.sum(metrics.exit.count))
    train = {
        f"{name}_{figure}": float(np.sum(total) / count)
        for name, branch in metrics._asdict().items()
        for figure, total in (("loss", branch.loss_sum), ("accuracy", branch.correct))
    }
    return {"round": number, "seconds": seconds, "images": count, "train": train}


def _scores(results: list[ClientResult]) -> Record:
    exit_mean, server_mean = means(results)
    return {
        "mean_exit_accuracy": exit_mean,
        "mean_server_accuracy": server_mean,
        "clients": [result._asdict() for result in results],
    }


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
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
    }
