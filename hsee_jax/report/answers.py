"""Tables of a report: answers of exits before the cut, and of the gated width."""

from collections.abc import Callable, Iterator, Sequence
from statistics import mean

import numpy as np

from hsee_jax.engine.evaluation import ClientResult
from hsee_jax.report.curves import Curve, mean_text
from hsee_jax.report.tables import Table

_NOTE = "mean over clients; mean ± standard deviation over seeds"

_GATED = {
    "exit_accuracy": "exit accuracy",
    "server_accuracy": "server accuracy",
    "flops_share": "FLOPs",
}


def further_answers(curves: Sequence[Curve]) -> Iterator[Table]:
    """Yield a table of the exits before the cut, and one of the gated width.

    Each has a row for each cut of each curve whose clients have such answers; a table
    without rows is left out.
    """
    exits = (
        (curve.label, str(cut), str(place), _text(own, _early(place - 1)))
        for curve, cut, own in _by_cut(curves)
        for place in range(1, 1 + len(own[0][0].early_accuracies))
    )
    title = f"Exits before the cut, counted from the input: {_NOTE}"
    yield from _table(title, ("curve", "cut", "exit", "accuracy"), exits)
    gated = (
        (curve.label, str(cut), *(_text(own, _gated(name)) for name in _GATED))
        for curve, cut, own in _by_cut(curves)
        if own[0][0].gated
    )
    title = f"Answers at the gated width; FLOPs relative to all channels: {_NOTE}"
    yield from _table(title, ("curve", "cut", *_GATED.values()), gated)


def _by_cut(
    curves: Sequence[Curve],
) -> Iterator[tuple[Curve, int, list[list[ClientResult]]]]:
    """Yield each curve with each of its cuts, and the cut's clients of each run."""
    for curve in curves:
        for cut in np.unique(curve.cuts).tolist():
            yield (
                curve,
                cut,
                [[one for one in run if one.cut == cut] for run in curve.clients],
            )


def _early(place: int) -> Callable[[ClientResult], float]:
    return lambda client: client.early_accuracies[place]


def _gated(name: str) -> Callable[[ClientResult], float]:
    return lambda client: getattr(client.gated, name)


def _text(
    runs: Sequence[Sequence[ClientResult]], figure: Callable[[ClientResult], float]
) -> str:
    return mean_text([mean(map(figure, run)) for run in runs], 4)


def _table(
    title: str, header: tuple[str, ...], rows: Iterator[tuple[str, ...]]
) -> Iterator[Table]:
    if found := list(rows):
        yield Table(title, header, found)
