"""Tables of what it takes to reach an accuracy: rounds, seconds, joules and bytes."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from hsee_jax.report.curves import BRANCHES, Curve, Values, mean_text
from hsee_jax.report.spending import BYTES, JOULES, QUANTITIES, SECONDS, spent
from hsee_jax.report.tables import Table

_LEVELS = (0.01, 0.02, 0.05, *(tens / 10 for tens in range(1, 10)), 0.95, 0.99)
_ROUNDING = 1e-9  # a mean this far below a level has reached it
_MOST = 5  # levels in a table: the highest that are reached
TARGETS = (
    "A row shows the first evaluated round in which the mean accuracy over the clients "
    "reaches the accuracy on the left, and what the run has spent by the end of this "
    "round. Rounds without an evaluation do not count; --eval-every 1 leaves none out."
)
_COLUMNS = {
    SECONDS: ("simulated seconds", 1.0),
    JOULES: ("joules", 1.0),
    BYTES: ("MB", 1e-6),
}


def targets(curves: Sequence[Curve]) -> list[Table]:
    """Make a table for exits and a table for servers.

    A row is an accuracy and a curve, with the first evaluated round in which the mean
    over clients reaches the accuracy, and what has been spent by the end of the round.
    There is no table if no curve knows what it has spent.
    """
    every = {q: [spent(curve, q) for curve in curves] for q in QUANTITIES}
    known = [q for q, own in every.items() if any(one is not None for one in own)]
    header = ("accuracy", "curve", "round", *(_COLUMNS[q][0] for q in known))
    scales = [1.0, *(_COLUMNS[q][1] for q in known)]
    rounds = [np.array([c.rounds] * len(c.runs), float) for c in curves]
    series = list(zip(rounds, *(every[q] for q in known), strict=True))
    tables = []
    for b, branch in enumerate(BRANCHES):
        means = [curve.accuracy[:, :, b].mean(axis=-1) for curve in curves]
        rows = []
        for level in levels(max(map(np.max, means))):
            for curve, mean, own in zip(curves, means, series, strict=True):
                cells = _cells(mean >= level - _ROUNDING, own, scales)
                rows.append((f"{level:.0%}", curve.label, *cells))
        title = f"What it takes to reach a test accuracy: {branch}s"
        if rows and known:
            tables.append(Table(title, header, rows))
    return tables


def levels(best: float) -> tuple[float, ...]:
    """Return the accuracies of a table, of which the highest is at most ``best``."""
    return tuple(level for level in _LEVELS if level - _ROUNDING <= best)[-_MOST:]


def _cells(
    reached: npt.NDArray[np.bool_],
    series: Sequence[Values | None],
    scales: Sequence[float],
) -> Iterator[str]:
    """Yield the text of each series ``[S, R]`` where each seed is first ``reached``."""
    some, first = np.asarray(reached.any(axis=1)), reached.argmax(axis=1)
    for column, (values, scale) in enumerate(zip(series, scales, strict=True)):
        if not some.all():
            count = f"{some.sum()} of {len(some)} seeds" if some.any() else "never"
            yield "" if column else count
        elif values is None:
            yield ""
        else:
            at = scale * values[np.arange(len(values)), first]
            yield mean_text(at, 1 if column else 0 if len(at) == 1 else 1)
