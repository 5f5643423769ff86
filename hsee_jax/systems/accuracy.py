"""Predict the accuracy that some cuts will give, from finished runs.

Two models predict each accuracy: ridge regression, and a graph network over the layers
after GCN-NAS (arXiv:2004.08423). Leave-one-out says which is better.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.systems.costs import LayerCost
from hsee_jax.systems.cut_features import Fit, Inputs, Predict, make_inputs
from hsee_jax.systems.layer_graph import fit_graph
from hsee_jax.systems.quantities import Bools, Floats, Ints
from hsee_jax.systems.ridge import fit_ridge

MODELS: Mapping[str, Fit] = {"ridge": fit_ridge, "graph": fit_graph}
_LEAST_EXAMPLES = 4  # different in cuts or settings, so that three are left
_LEAST_CUTS = 2


class Trained(NamedTuple):
    """The accuracies of a finished run."""

    cuts: tuple[int, ...]  # of N clients
    exit_accuracies: tuple[float, ...]  # of N clients
    server_accuracy: float  # mean over the clients
    settings: tuple[float, ...] = ()  # S numbers that tell other options apart

    @property
    def exits(self) -> dict[int, float]:
        """Return the mean exit accuracy of the clients of each cut."""
        cuts, values = np.array(self.cuts), np.array(self.exit_accuracies)
        return {int(cut): float(values[cuts == cut].mean()) for cut in np.unique(cuts)}


class Score(NamedTuple):
    """How well a model predicts what it was not fitted to."""

    mean_error: float  # absolute
    # Kendall's rank correlation; NaN if all predictions or all values are equal.
    tau: float


class Estimate(NamedTuple):
    """The prediction of one accuracy by the better of two models."""

    scores: Mapping[str, Score]  # of `MODELS`, and of the ``mean`` of the other rows
    winner: str  # the model with the least mean error
    predict: Predict


class Predictor(NamedTuple):
    """Predictions of the accuracies of a network whose clients have some cuts."""

    costs: tuple[LayerCost, ...]
    mixes: int  # number of different mixes of cuts and settings that it was fitted to
    tried: tuple[int, ...]  # the cuts of the clients in these mixes
    server: Estimate  # mean server accuracy, from the cuts of all clients
    mean_exit: Estimate  # mean exit accuracy, from the cuts of all clients
    exit: Estimate  # exit accuracy of a client, from its own cut

    def means(self, cuts: Ints, settings: Sequence[float] = ()) -> tuple[float, float]:
        """Predict the mean exit and the mean server accuracy of cuts ``int64 [N]``."""
        inputs = make_inputs(self.costs, [cuts], [settings])
        exits, servers = (_of(one, inputs) for one in (self.mean_exit, self.server))
        return float(exits[0]), float(servers[0])

    def exits(self, settings: Sequence[float] = ()) -> Floats:
        """Predict the exit accuracy of a client of each cut 1..L, ``[L]``."""
        cuts = [np.array([cut]) for cut in range(1, len(self.costs) // 2 + 1)]
        return _of(self.exit, make_inputs(self.costs, cuts, [settings] * len(cuts)))


def fit_accuracy(costs: Sequence[LayerCost], trained: Sequence[Trained]) -> Predictor:
    """Fit predictors of accuracy to finished runs.

    Runs with the same cuts and settings, such as those of several seeds, count as one
    mix with their mean. Leave-one-out leaves out a mix; for the exits it leaves out all
    mixes whose exits are exactly equal, since strategies that differ only behind the
    cut train the same exits.

    Args:
      costs: the costs of L layers, L exits and the final head.
      trained: the runs.

    Raises:
      UserError: the runs are too few, or their cuts too much alike.
    """
    runs = _merged(trained)
    cuts = [np.array(run.cuts) for run in runs]
    if len(runs) < _LEAST_EXAMPLES or len({run.cuts for run in runs}) < _LEAST_CUTS:
        raise UserError(
            f"accuracy_from: {len(trained)} run(s) with {len(runs)} different mixes of "
            f"cuts and settings, and {len({run.cuts for run in runs})} of cuts alone, "
            f"are too few; allowed are {_LEAST_EXAMPLES} or more, and {_LEAST_CUTS} or "
            "more of cuts alone"
        )
    inputs = make_inputs(costs, cuts, [run.settings for run in runs])
    mixes = np.arange(len(runs))
    servers = np.array([run.server_accuracy for run in runs])
    exits = np.array([np.mean(run.exit_accuracies) for run in runs])
    twins = np.unique(exits, return_inverse=True)[1]
    twins = twins if twins.any() else mixes
    by_cut = [(i, cut, v) for i, run in enumerate(runs) for cut, v in run.exits.items()]
    alone = make_inputs(
        costs,
        [np.array([cut]) for _, cut, _ in by_cut],
        [runs[i].settings for i, _, _ in by_cut],
    )
    values = np.array([value for _, _, value in by_cut])
    return Predictor(
        tuple(costs),
        len(runs),
        tuple(sorted({cut for run in runs for cut in run.cuts})),
        _estimate(inputs, servers, mixes),
        _estimate(inputs, exits, twins),
        _estimate(alone, values, twins[[i for i, _, _ in by_cut]]),
    )


def leave_one_out(fit: Fit, inputs: Inputs, values: Floats, groups: Ints) -> Floats:
    """Return the prediction of each row by a model fitted to all other groups, ``[n]``.

    Args:
      fit: fits the model.
      inputs: the features of n rows.
      values: the accuracies to predict, ``[n]``.
      groups: the group of each row, ``int64 [n]``, which is left out as a whole.
    """
    found = np.empty(len(values))
    for group in np.unique(groups):
        kept = groups != group
        found[~kept] = fit(inputs, values, kept)(inputs)[~kept]
    return found


def kendall_tau(first: Floats, second: Floats) -> float:
    """Return Kendall's tau-b of two series ``[n]``; NaN where one is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    from scipy.stats import kendalltau  # slow to import

    return float(kendalltau(first, second).statistic)


def _estimate(inputs: Inputs, values: Floats, groups: Ints) -> Estimate:
    scores = {
        name: _score(leave_one_out(fit, inputs, values, groups), values)
        for name, fit in {**MODELS, "mean": _fit_mean}.items()
    }
    scores["mean"] = scores["mean"]._replace(tau=float("nan"))
    winner = min(MODELS, key=lambda name: scores[name].mean_error)
    everything = np.ones(len(values), bool)
    return Estimate(scores, winner, MODELS[winner](inputs, values, everything))


def _score(predictions: Floats, values: Floats) -> Score:
    error = float(np.abs(predictions - values).mean())
    return Score(error, kendall_tau(predictions, values))


def _fit_mean(inputs: Inputs, values: Floats, kept: Bools) -> Predict:
    mean = float(values[kept].mean())
    return lambda inputs: np.full(len(inputs.layers), mean)


def _of(estimate: Estimate, inputs: Inputs) -> Floats:
    return np.clip(estimate.predict(inputs), 0.0, 1.0)


def _merged(trained: Sequence[Trained]) -> list[Trained]:
    """Return a run for each mix of cuts and settings, with mean accuracies."""
    alike: dict[tuple[tuple[int, ...], tuple[float, ...]], list[Trained]] = {}
    for run in trained:
        order = np.argsort(run.cuts, kind="stable")
        cuts = tuple(int(run.cuts[i]) for i in order)
        exits = tuple(run.exit_accuracies[i] for i in order)
        own = run._replace(cuts=cuts, exit_accuracies=exits)
        alike.setdefault((cuts, run.settings), []).append(own)
    return [
        Trained(
            cuts,
            tuple(np.mean([run.exit_accuracies for run in runs], axis=0).tolist()),
            float(np.mean([run.server_accuracy for run in runs])),
            settings,
        )
        for (cuts, settings), runs in alike.items()
    ]
