"""The output of ``hsee plan --accuracy-from``: how good the predictions are."""

from typing import Any

import numpy as np

from hsee_jax.report.tables import Table
from hsee_jax.runs.accuracy import Expectations
from hsee_jax.systems.accuracy import MODELS, Estimate, Predictor
from hsee_jax.systems.quantities import Ints

_TITLES = {
    "server": "mean server accuracy",
    "mean_exit": "mean exit accuracy",
    "exit": "exit accuracy by cut",
}


def leave_one_out_table(expected: Expectations, cuts: Ints) -> Table:
    """Make a table of the models' errors on runs that they were not fitted to.

    The title names what the runs do not cover: options of the plan, and its cuts.

    Args:
      expected: the predictions for the plan.
      cuts: the plan's cuts, ``int64 [N]``.
    """
    header = ["accuracy"]
    for model in MODELS:
        header += [f"{model} error", f"{model} tau"]
    estimates = _estimates(expected.predictor)
    rows = [(title, *_cells(one)) for title, one in estimates.items()]
    title = (
        f"accuracy predicted from {expected.runs} runs, {expected.predictor.mixes} "
        "mixes of cuts and options; by leave-one-out: mean absolute error, Kendall tau"
    )
    if expected.differences:
        title += f"\nthe plan has {', '.join(expected.differences)} in the runs"
    untried = sorted({*cuts.tolist()} - {*expected.predictor.tried})
    if untried:
        title += f"\nno run has a client of cut {', '.join(map(str, untried))}"
    return Table(title, (*header, "error of the mean", "winner"), rows)


def _estimates(predictor: Predictor) -> dict[str, Estimate]:
    return {title: getattr(predictor, name) for name, title in _TITLES.items()}


def _cells(estimate: Estimate) -> tuple[str, ...]:
    cells = []
    for model in MODELS:
        score = estimate.scores[model]
        tau = "none" if np.isnan(score.tau) else f"{score.tau:.2f}"
        cells += [f"{score.mean_error:.4f}", tau]
    mean, used = estimate.scores["mean"].mean_error, estimate.winner
    is_best = estimate.scores[used].mean_error < mean
    return (*cells, f"{mean:.4f}", used if is_best else f"{used}, behind the mean")


def predicted(expected: Expectations, cuts: Ints) -> dict[str, Any]:
    """Return the predicted means for cuts ``int64 [N]`` as values of JSON.

    The result also names the models that made the predictions, with their errors by
    leave-one-out.
    """
    predictor = expected.predictor
    exits, servers = predictor.means(cuts, expected.settings)
    return {
        "mean_exit_accuracy": exits,
        "mean_server_accuracy": servers,
        "models": {
            title: {
                "model": one.winner,
                "mean_error": one.scores[one.winner].mean_error,
            }
            for title, one in _estimates(predictor).items()
        },
        "differences": list(expected.differences),
    }
