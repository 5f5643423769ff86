"""Runs as curves: runs that differ only in their seeds are one curve."""

import os
import statistics
import sys
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hsee_jax.core.errors import UserError
from hsee_jax.core.options import text_of
from hsee_jax.core.paths import resolve
from hsee_jax.data.partition import Share
from hsee_jax.engine.evaluation import ClientResult
from hsee_jax.runs.history import read_history
from hsee_jax.runs.one_network import is_one_network
from hsee_jax.runs.records import RoundRecord, Summary, TrainFigures

BRANCHES = ("exit", "server")
Values = npt.NDArray[np.float64]
Options = Mapping[str, Any]  # the options of a run, by name


class Run(NamedTuple):
    """The content of a run's folder."""

    name: str  # the folder, relative to the common parent of all runs
    settings: Options  # without options of the run's own, see `History.settings`
    data_dir: str | None
    seeds: tuple[int, ...]
    partition: list[Share]
    records: list[RoundRecord]
    accuracies: dict[int, Values]  # evaluated round -> ``[2, N]``, see `BRANCHES`
    machine: str  # the device and the versions; empty until the run ends
    agreement: npt.NDArray[np.int64]  # ``[N, 4, K]``, see `Agreement`; may be empty
    one_network: bool  # see `is_one_network`


class Curve(NamedTuple):
    """Runs that differ only in their seeds, with the same last evaluated round.

    Runs with equal seeds are no repetitions: each has a curve of its own.
    """

    label: str  # the options in which it differs from the other curves
    options: Options  # the options of all its runs, without each run's own
    runs: tuple[Run, ...]
    rounds: tuple[int, ...]  # the rounds that all runs have evaluated
    accuracy: Values  # ``[S, R, 2, N]``: runs, rounds, branches, clients

    @property
    def final(self) -> Values:
        """Return the accuracy after the last evaluated round, ``[S, 2, N]``."""
        return self.accuracy[:, -1]

    @property
    def clients(self) -> list[Sequence[ClientResult]]:
        """Return the scores of each run's clients in the last evaluated round."""
        tests = [run.records[self.rounds[-1] - 1].test for run in self.runs]
        return [test.clients for test in tests if test is not None]

    @property
    def cuts(self) -> npt.NDArray[np.int64]:
        """Return the cut of each client in the last evaluated round, ``[N]``."""
        return np.array([client.cut for client in self.clients[0]])

    @property
    def losses(self) -> Values:
        """Return the training losses ``[S, T, 2]`` of the T rounds that all runs have.

        Rounds count from 1; a loss that is not finite is NaN.
        """
        count = min(len(run.records) for run in self.runs)
        losses = np.array(
            [
                [_losses(record.train) for record in run.records[:count]]
                for run in self.runs
            ]
        )
        return np.where(np.isfinite(losses), losses, np.nan)

    @property
    def agreement(self) -> npt.NDArray[np.int64] | None:
        """Return the sum of `Run.agreement` over the runs, ``[N, 4, K]``.

        The result is None if a run has no agreement.
        """
        parts = [run.agreement for run in self.runs]
        return np.sum(parts, axis=0) if all(map(len, parts)) else None

    @property
    def one_network(self) -> bool:
        """Return whether all servers score the same, see `is_one_network`."""
        return all(run.one_network for run in self.runs)


def spread(values: Values) -> tuple[Any, Any]:
    """Return mean and sample standard deviation over axis 0.

    The deviation of a single value is 0.
    """
    deviation = values.std(axis=0, ddof=1) if len(values) > 1 else 0 * values[0]
    return values.mean(axis=0), deviation


def mean_text(values: Sequence[float] | Values, digits: int) -> str:
    """Return mean ± deviation, see `spread`; the mean of one value, or "none"."""
    if not len(values):
        return "none"
    mean = statistics.mean(map(float, values))  # exact: other sums may round a tie down
    deviation, text = spread(np.array(values))[1], f"{mean:,.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {deviation:,.{digits}f}"


def differing(every: Sequence[Options]) -> list[str]:
    """Return the names of the options that differ between the runs that have them."""
    names = dict.fromkeys(name for options in every for name in options)
    return [n for n in names if len({own[n] for own in every if n in own}) > 1]


def read_curves(folders: Sequence[Path]) -> tuple[Curve, ...]:
    """Read runs and group them, in the order of the folders.

    Raises:
      UserError: a folder is not a run, or is damaged, given twice or not yet evaluated.
    """
    places = [resolve(folder) for folder in folders]
    common = os.path.commonpath([place.parent for place in places])
    groups: dict[Hashable, list[Run]] = {}
    copies = Counter[Hashable]()  # of the settings and seeds so far
    for number, (folder, place) in enumerate(zip(folders, places, strict=True)):
        if place in places[:number]:
            raise UserError(f"run: {folder} is given twice")
        run = _read_run(folder, _readable(str(place.relative_to(common))))
        common_key = frozenset(run.settings.items()), max(run.accuracies)
        copies[common_key, run.seeds] += 1
        key = *common_key, copies[common_key, run.seeds]
        groups.setdefault(key, []).append(run)
    names = differing([runs[0].settings for runs in groups.values()]) or ["strategy"]
    curves = [_curve(names, tuple(runs)) for runs in groups.values()]
    uses = Counter(curve.label for curve in curves)
    return tuple(
        curve
        if uses[curve.label] == 1
        else curve._replace(label=f"{curve.label} ({curve.runs[0].name})")
        for curve in curves
    )


def _options(run: Run) -> dict[str, Any]:
    """Return the settings of a run, with the folder of the user's own data."""
    options = dict(run.settings)
    if run.data_dir is not None and options.get("data", run.data_dir) != run.data_dir:
        options["data"] = f"{run.data_dir} ({options['data']})"
    return options


def _curve(names: list[str], runs: tuple[Run, ...]) -> Curve:
    options, last = _options(runs[0]), max(runs[0].accuracies)
    own = [f"{name}={text_of(options[name])}" for name in names if name in options]
    label = ", ".join(own)
    if last < options["rounds"]:
        label += f" (unfinished: {last} of {options['rounds']} rounds)"
    rounds = sorted(set.intersection(*(set(run.accuracies) for run in runs)))
    accuracy = [[run.accuracies[number] for number in rounds] for run in runs]
    return Curve(label, options, runs, tuple(rounds), np.array(accuracy))


def _read_run(folder: Path, name: str) -> Run:
    history = read_history(folder)
    scores = {r.round: r.test for r in history.records if r.test is not None}
    if not scores:
        raise UserError(f"run: {folder} has no evaluated round yet")
    accuracies = {
        number: np.array(
            [[getattr(c, f"{b}_accuracy") for c in test.clients] for b in BRANCHES]
        )
        for number, test in scores.items()
    }
    last, settings = scores[max(scores)], history.settings
    data_dir = history.options.get("data_dir")
    return Run(
        name,
        {n: _readable(v) if isinstance(v, str) else v for n, v in settings.items()},
        None if data_dir is None else _readable(data_dir),
        history.seeds,
        history.partition,
        history.records,
        accuracies,
        _machine(history.summary),
        _agreement(history.summary),
        # A report imports no plugin: others than those of this process may do harm.
        sys.modules.keys() >= set(history.options["plugin"])
        and is_one_network(folder, last),
    )


def _readable(name: str) -> str:
    """Return the name of a file as text that can be written, whatever its bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _losses(figures: TrainFigures) -> list[float]:
    return [getattr(figures, f"{branch}_loss") for branch in BRANCHES]


def _agreement(summary: Summary | None) -> npt.NDArray[np.int64]:
    return np.array(() if summary is None else summary.agreement, np.int64)


def _machine(summary: Summary | None) -> str:
    if summary is None:
        return ""
    versions = ", ".join(" ".join(pair) for pair in summary.versions.items())
    return f"{summary.device}; {versions}"
