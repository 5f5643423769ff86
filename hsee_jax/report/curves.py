"""Runs as curves: runs that differ only in their seeds are one curve."""

import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hsee_jax.core.errors import UserError
from hsee_jax.core.options import text_of
from hsee_jax.data.partition import Share
from hsee_jax.runs.history import OWN, read_history
from hsee_jax.runs.records import RoundRecord, Summary

BRANCHES = ("exit", "server")
Values = npt.NDArray[np.float64]
Options = Mapping[str, Any]  # the options of a run, by name


class Run(NamedTuple):
    """The content of a run's folder."""

    name: str  # the folder, relative to the common parent of all runs
    options: Options
    seeds: tuple[int, ...]
    partition: list[Share]
    records: list[RoundRecord]
    accuracies: dict[int, Values]  # evaluated round -> ``[2, N]``, see `BRANCHES`
    machine: str  # the device and the versions; empty until the run ends


class Curve(NamedTuple):
    """Runs that differ only in their seeds, with the same last evaluated round."""

    label: str  # the options in which it differs from the other curves
    options: Options  # the options of all its runs, without each run's own
    runs: tuple[Run, ...]
    rounds: tuple[int, ...]  # the rounds that all runs have evaluated
    accuracy: Values  # ``[S, R, 2, N]``: runs, rounds, branches, clients

    @property
    def final(self) -> Values:
        """Return the accuracy after the last round, ``[S, 2, N]``."""
        return self.accuracy[:, -1]

    @property
    def cuts(self) -> npt.NDArray[np.int64]:
        """Return the cut of each client, ``[N]``."""
        return np.array([share.cut for share in self.runs[0].partition])


def spread(values: Values) -> tuple[Any, Any]:
    """Return mean and sample standard deviation (0 of one) over the leading axis."""
    deviation = values.std(axis=0, ddof=1) if len(values) > 1 else 0 * values[0]
    return values.mean(axis=0), deviation


def differing(every: Sequence[Options]) -> list[str]:
    """Return the options that differ between the runs that have them."""
    names = dict.fromkeys(name for options in every for name in options)
    return [n for n in names if len({own[n] for own in every if n in own}) > 1]


def read_curves(folders: Sequence[Path]) -> tuple[Curve, ...]:
    """Read runs and group them, in the order of the folders.

    Raises:
      UserError: a folder is not a run, or is damaged, given twice or not yet evaluated.
    """
    places = [folder.resolve() for folder in folders]
    common = os.path.commonpath([place.parent for place in places])
    groups: dict[Hashable, list[Run]] = {}
    for number, (folder, place) in enumerate(zip(folders, places, strict=True)):
        if place in places[:number]:
            raise UserError(f"run: {folder} is given twice")
        relative = os.fsencode(place.relative_to(common))
        run = _read_run(folder, relative.decode("utf-8", "backslashreplace"))
        key = frozenset(_shared_options(run).items()), max(run.accuracies)
        groups.setdefault(key, []).append(run)
    curves = [_shared_options(runs[0]) for runs in groups.values()]
    names = differing(curves) or ["strategy"]
    return tuple(_curve(names, tuple(runs)) for runs in groups.values())


def _shared_options(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.options.items() if name not in OWN}


def _curve(names: list[str], runs: tuple[Run, ...]) -> Curve:
    options, last = _shared_options(runs[0]), max(runs[0].accuracies)
    own = [f"{name}={text_of(options[name])}" for name in names if name in options]
    label = ", ".join(own)
    if last < options["rounds"]:
        label += f" (unfinished: {last} of {options['rounds']} rounds)"
    rounds = sorted(set.intersection(*(set(run.accuracies) for run in runs)))
    accuracy = [[run.accuracies[number] for number in rounds] for run in runs]
    return Curve(label, options, runs, tuple(rounds), np.array(accuracy))


def _read_run(folder: Path, name: str) -> Run:
    history = read_history(folder)
    accuracies = {
        record.round: np.array(
            [
                [getattr(c, f"{b}_accuracy") for c in record.test.clients]
                for b in BRANCHES
            ]
        )
        for record in history.records
        if record.test is not None
    }
    if not accuracies:
        raise UserError(f"run: {folder} has no evaluated round yet")
    return Run(
        name,
        history.options,
        history.seeds,
        history.partition,
        history.records,
        accuracies,
        _machine(history.summary),
    )


def _machine(summary: Summary | None) -> str:
    if summary is None:
        return ""
    versions = ", ".join(" ".join(pair) for pair in summary.versions.items())
    return f"{summary.device}; {versions}"
