"""The picture of a study: the final accuracies of its rows."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np

from hsee_jax.report.curves import Curve
from hsee_jax.report.final import comparison
from hsee_jax.report.style import RC, png, wrap
from hsee_jax.studies.results import Result, by_row
from hsee_jax.studies.study import Study


def draw(study: Study, results: Sequence[Result]) -> bytes:
    """Draw the mean accuracy of each row's exits and servers, with the seeds behind it.

    Returns:
      The figure as PNG; empty if no row has an accuracy.
    """
    found = by_row(study, results).items()
    curves = [_curve(name, own) for name, own in found if any(r.summary for r in own)]
    if not curves:
        return b""
    title = f"{study.title}\nFinal test accuracy, mean over clients"
    if any(len(curve.accuracy) > 1 for curve in curves):
        title += "; small: each seed; line: ± standard deviation over seeds"
    with mpl.rc_context(RC):
        figure = comparison(curves)
        figure.suptitle(wrap(title))
        return png(figure)


def _curve(name: str, results: Sequence[Result]) -> Curve:
    """Return the means over clients after the last round as a curve of one point."""
    scores = [result.summary.scores for result in results if result.summary]
    means = [[one.mean_exit_accuracy, one.mean_server_accuracy] for one in scores]
    accuracy = np.array(means)[:, None, :, None]
    return Curve(name, {}, (), (0,), accuracy)
