"""What runs have left in their folders, and which of them are one curve."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hsee_jax.base import UserError
from hsee_jax.config import SEEDS, Config, flatten, override
from hsee_jax.folder import Record, read_config
from hsee_jax.partition import Share

BRANCHES = ("exit", "server")
Values = npt.NDArray[np.float64]

# What the runs of a curve may differ in.
OWN = {**dict.fromkeys(SEEDS, 0), "data_dir": None}


class Run(NamedTuple):
    """A run's folder, read."""

    name: str  # the folder, as seen from the one that holds all runs
    config: Config
    partition: list[Share]
    records: list[Record]  # the lines of ``metrics.jsonl``
    accuracies: dict[int, Values]  # evaluated round -> ``[2, N]``, see `BRANCHES`
    machine: str  # device and versions; empty until the run ends


class Curve(NamedTuple):
    """Runs that differ in their seeds alone, and have come equally far."""

    label: str  # the options in which it differs from the other curves
    config: Config  # of all its runs, without what is a run's own
    runs: tuple[Run, ...]
    rounds: tuple[int, ...]  # evaluated in all of them
    accuracy: Values  # ``[S, R, 2, N]``: runs, rounds, branches, clients

    @property
    def final(self) -> Values:
        """Accuracy after the last round, ``[S, 2, N]``."""
        return self.accuracy[:, -1]

    @property
    def cuts(self) -> npt.NDArray[np.int64]:
        """Of each client, ``[N]``."""
        return np.array([share.cut for share in self.runs[0].partition])


def spread(values: Values) -> tuple[Any, Any]:
    """Mean and sample standard deviation over the leading axis; that of one is 0."""
    deviation = values.std(axis=0, ddof=1) if len(values) > 1 else 0 * values[0]
    return values.mean(axis=0), deviation


def differing(configs: Sequence[Config]) -> list[str]:
    """The options in which configurations differ."""
    every = [flatten(config) for config in configs]
    return [name for name in every[0] if len({values[name] for values in every}) > 1]


def shown(value: Any) -> str:
    """An option's value as it is written on the command line."""
    return " ".join(value) if isinstance(value, tuple) else str(value)


def read_curves(folders: Sequence[Path]) -> tuple[Curve, ...]:
    """Reads runs and groups them, in the order in which they are given.

    Raises:
      UserError: one is not a run, is damaged, given twice, or not yet evaluated.
    """
    places = [folder.resolve() for folder in folders]
    common = os.path.commonpath([place.parent for place in places])
    groups: dict[tuple[Config, int], list[Run]] = {}
    for number, (folder, place) in enumerate(zip(folders, places, strict=True)):
        if place in places[:number]:
            raise UserError(f"run: {folder} is given twice")
        relative = os.fsencode(place.relative_to(common))
        run = _read_run(folder, relative.decode("utf-8", "backslashreplace"))
        key = override(run.config, **OWN), max(run.accuracies)
        groups.setdefault(key, []).append(run)
    names = differing([config for config, _ in groups]) or ["strategy"]
    return tuple(
        _curve(config, last, names, tuple(runs))
        for (config, last), runs in groups.items()
    )


def _curve(config: Config, last: int, names: list[str], runs: tuple[Run, ...]) -> Curve:
    values = flatten(config)
    label = ", ".join(f"{name}={shown(values[name])}" for name in names)
    if last < config.run.rounds:
        label += f" (unfinished: {last} of {config.run.rounds} rounds)"
    rounds = sorted(set.intersection(*(set(run.accuracies) for run in runs)))
    accuracy = [[run.accuracies[number] for number in rounds] for run in runs]
    return Curve(label, config, runs, tuple(rounds), np.array(accuracy))


def _read_run(folder: Path, name: str) -> Run:
    config = read_config(folder)
    path = folder / "partition.json"
    with _reading(path):
        partition = [Share(**entry) for entry in json.loads(path.read_text())]
        np.array([share.label_counts for share in partition], np.int64).reshape(
            config.clients.num_clients, -1
        )
    records, accuracies = _read_records(folder / "metrics.jsonl", len(partition))
    if not accuracies:
        raise UserError(f"run: {folder} has no evaluated round yet")
    machine, path = "", folder / "summary.json"
    if path.exists():
        with _reading(path):
            summary = json.loads(path.read_text())
            versions = [" ".join(pair) for pair in summary["versions"].items()]
            machine = f"{summary['device']}; {', '.join(versions)}"
    return Run(name, config, partition, records, accuracies, machine)


def _read_records(path: Path, clients: int) -> tuple[list[Record], dict[int, Values]]:
    """All records, and the accuracies in those that have been evaluated."""
    with _reading(path):
        lines = path.read_text().splitlines()
    records: list[Record] = []
    accuracies = {}
    for number, line in enumerate(lines, start=1):
        with _reading(f"{path}, line {number},"):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                if number == len(lines):  # cut off when the run was killed
                    break
                raise
            for name in ("images", "seconds", "wall_seconds"):
                float(record[name])
            if "test" in record:
                results = sorted(record["test"]["clients"], key=lambda one: one["id"])
                accuracies[int(record["round"])] = np.array(
                    [[one[f"{b}_accuracy"] for one in results] for b in BRANCHES],
                    np.float64,
                ).reshape(len(BRANCHES), clients)
            records.append(record)
    return records, accuracies


@contextmanager
def _reading(what: object) -> Iterator[None]:
    """Says in one line what is wrong with a file of a run."""
    try:
        yield
    except OSError as error:
        raise UserError(f"run: {what} cannot be read: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"run: {what} is damaged: {type(error).__name__}: {error}"
        ) from error
