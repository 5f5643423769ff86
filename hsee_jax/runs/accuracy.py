"""Predictors of accuracy fitted to finished runs, for the plan of another run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hsee_jax.config.schema import BOOKKEEPING, SEEDS, Config
from hsee_jax.config.values import SECTIONS, override, settings
from hsee_jax.core.errors import UserError
from hsee_jax.nn.registry import NETWORKS
from hsee_jax.runs.history import read_history
from hsee_jax.runs.records import Scores
from hsee_jax.systems.accuracy import Predictor, Trained, fit_accuracy
from hsee_jax.systems.costs import LayerCost

_Options = Mapping[str, Any]
_LEFT_OUT = (*SEEDS, *BOOKKEEPING, "cuts")
_COMPUTATION = ("conv", "dtype")  # options of the model that leave the network as it is


class FinishedRun(NamedTuple):
    """The options and the last scores of a run."""

    name: str  # for errors
    options: _Options  # that have an effect on the training
    scores: Scores


class Experience(NamedTuple):
    """Predictors of accuracy, and the runs that they were fitted to."""

    predictor: Predictor
    runs: tuple[FinishedRun, ...]
    columns: tuple[tuple[str, Any], ...]  # of the settings: an option and its value
    means: tuple[float, ...]  # of the settings over the runs


class Expectations(NamedTuple):
    """What accuracy the cuts of a plan will give, judged by finished runs."""

    predictor: Predictor
    settings: tuple[float, ...]  # of the plan, see `Trained`
    runs: int  # number of runs
    differences: tuple[str, ...]  # between the plan and all runs, in words


def read_finished(folder: Path) -> FinishedRun:
    """Read the folder of a finished run.

    Raises:
      UserError: it is not the folder of a run, or the run has not come to its end.
    """
    history = read_history(folder)
    if history.summary is None:
        raise UserError(
            f"accuracy_from: {folder} is not finished; allowed are finished runs"
        )
    return FinishedRun(str(folder), history.settings, history.summary.scores)


def learn(
    config: Config, costs: Sequence[LayerCost], runs: Sequence[FinishedRun]
) -> Experience:
    """Fit predictors of accuracy to finished runs.

    Options that differ between the runs, other than seeds and cuts, become settings:
    one for each of their values.

    Args:
      config: of a plan for the same network.
      costs: of this network.
      runs: at least one.

    Raises:
      UserError: the runs differ in their network or data, or the plan from them; or
        they are too few.
    """
    known = [_plain(run.options) for run in runs]
    for name in (*_identity(), "data"):
        for run, own in zip(runs, known, strict=True):
            if own.get(name) != known[0].get(name):
                raise UserError(
                    f"accuracy_from: {name} is {own.get(name)} in {run.name} and "
                    f"{known[0].get(name)} in {runs[0].name}; allowed are runs of one "
                    "network and one dataset"
                )
    _check_plan(_identity(), known, _plain(settings(config)))
    columns = _columns(known)
    trained = [
        Trained(
            tuple(client.cut for client in run.scores.clients),
            tuple(client.exit_accuracy for client in run.scores.clients),
            run.scores.mean_server_accuracy,
            tuple(float(own.get(name) == value) for name, value in columns),
        )
        for run, own in zip(runs, known, strict=True)
    ]
    means = np.mean([run.settings for run in trained], axis=0).tolist()
    predictor = fit_accuracy(costs, trained)
    return Experience(predictor, tuple(runs), tuple(columns), tuple(means))


def expect(experience: Experience, config: Config) -> Expectations:
    """Return what accuracy to expect of a configuration.

    Where the configuration has a value that no run has, the mean of the runs stands for
    it, and `Expectations.differences` names it.

    Raises:
      UserError: no run has its strategy.
    """
    known = [_plain(run.options) for run in experience.runs]
    plan = _plain(settings(config))
    _check_plan(["strategy"], known, plan)
    differences = _differences(known, plan)
    own = tuple(
        mean if name in differences else float(plan.get(name) == value)
        for (name, value), mean in zip(
            experience.columns, experience.means, strict=True
        )
    )
    texts = tuple(differences.values())
    return Expectations(experience.predictor, own, len(known), texts)


def _check_plan(
    names: Sequence[str], known: Sequence[_Options], plan: _Options
) -> None:
    """Refuse a plan with a value of some options that no run has."""
    for name in names:
        values = [own.get(name) for own in known]
        if plan.get(name) not in values:
            allowed = ", ".join(dict.fromkeys(map(str, values)))
            raise UserError(
                f"accuracy_from: no run has the {name} {plan.get(name)} of the plan; "
                f"the runs have {allowed}"
            )


def _identity() -> list[str]:
    """Return the options that say which network is trained on which dataset."""
    model = SECTIONS["model"].known()
    return ["dataset", *(name for name in model if name not in _COMPUTATION)]


def _plain(values: _Options) -> dict[str, Any]:
    """Return the options that tell runs apart, as values of JSON.

    Options that are newer than a run, also those of its network, have their defaults.
    The digest or the folder of the user's own data is ``data``.
    """
    config, network = Config(), values.get("network")
    if network in NETWORKS:
        config = override(config, network=network)
    fixed = {name for section in SECTIONS.values() for name in section.fields()}
    filled = fixed | set(config.model.options)
    defaults = settings(config)
    known = {name: value for name, value in defaults.items() if name in filled}
    known |= json.loads(json.dumps(dict(values)))
    if "data_dir" in known:
        known.setdefault("data", known["data_dir"])
    return {name: value for name, value in known.items() if name not in _LEFT_OUT}


def _columns(known: Sequence[_Options]) -> list[tuple[str, Any]]:
    """Return the options that differ between the runs, with each of their values."""
    columns = []
    for name in dict.fromkeys(name for own in known for name in own):
        values = _values(known, name)
        if len(values) > 1:
            columns += [(name, value) for value in values]
    return columns


def _values(known: Sequence[_Options], name: str) -> list[Any]:
    """Return the different values of an option in the runs that have it."""
    found: list[Any] = []
    for own in known:
        if name in own and own[name] not in found:
            found.append(own[name])
    return found


def _differences(known: Sequence[_Options], plan: _Options) -> dict[str, str]:
    """Return what the plan has in no run, in words, by the name of the option."""
    found = {}
    for name, value in plan.items():
        values = _values(known, name)
        if name != "data" and values and value not in values:
            found[name] = f"{name} {value} instead of {' or '.join(map(str, values))}"
    return found
