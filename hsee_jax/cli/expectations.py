"""The accuracy that a plan may expect, learnt from the runs of ``--accuracy-from``."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hsee_jax.config import Config, override
from hsee_jax.core.errors import UserError
from hsee_jax.runs.accuracy import (
    Expectations,
    Experience,
    FinishedRun,
    expect,
    learn,
    read_finished,
)
from hsee_jax.runs.history import name_data
from hsee_jax.runs.planning import Planning, problem_of
from hsee_jax.studies.results import FILE, Result, current, read_results
from hsee_jax.systems.problem import Problem


def read_experience(places: Sequence[Path], known: Planning) -> Experience | None:
    """Fit predictors to the runs in some places; return None without places.

    Args:
      places: folders of runs, and folders of studies with their ``results.jsonl``.
      known: what the plan knows of the run.

    Raises:
      UserError: a place holds no finished run; or see `learn`.
    """
    if not places:
        return None
    runs = [run for place in places for run in _read(place)]
    return learn(known.config, known.costs, runs)


def expected_problem(
    known: Planning, experience: Experience | None, strategy: str | None = None
) -> tuple[Problem, Expectations | None]:
    """Return the planner's problem with the predicted accuracies of the exits.

    Args:
      known: what the plan knows of the run.
      experience: predictors fitted to finished runs; None predicts nothing.
      strategy: see `problem_of`.

    Raises:
      UserError: see `problem_of` and `expect`.
    """
    problem = problem_of(known, strategy)
    if experience is None:
        return problem, None
    expected = expect(experience, _config(known.config, strategy))
    exits = expected.predictor.exits(expected.settings)
    return problem._replace(exit_accuracy=exits), expected


def _config(config: Config, strategy: str | None) -> Config:
    return config if strategy is None else override(config, strategy=strategy)


def _read(place: Path) -> list[FinishedRun]:
    folder = place.parent if place.name == FILE else place
    if not os.path.exists(folder / FILE):
        return [read_finished(folder)]
    runs = [
        FinishedRun(
            f"{folder / FILE}, row {result.row}",
            _options(result),
            result.summary.scores,
        )
        for result in current(read_results(folder))
        if result.summary is not None
    ]
    if not runs:
        raise UserError(
            f"accuracy_from: {folder / FILE} holds no finished run; allowed is one or "
            "more"
        )
    return runs


def _options(result: Result) -> dict[str, Any]:
    """Return the settings of a result, with its data named as in a run's folder."""
    options = dict(result.settings)
    if "data_dir" in options:
        options["data"] = name_data(result.digest, options["data_dir"])
    return options
