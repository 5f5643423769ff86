"""What runs have spent by a round: simulated seconds, joules and bytes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from hsee_jax.report.curves import Curve, Values
from hsee_jax.runs.records import RoundRecord


class Quantity(NamedTuple):
    """Something that training spends."""

    name: str
    unit: str
    # Return the sum over all rounds up to each of the T rounds, or nothing.
    totals: Callable[[Sequence[RoundRecord]], Sequence[float]]


def _seconds(records: Sequence[RoundRecord]) -> Sequence[float]:
    rounds = [r.simulated for r in records if r.simulated is not None]
    return [one.end_s for one in rounds] if len(rounds) == len(records) else ()


def _joules(records: Sequence[RoundRecord]) -> Sequence[float]:
    rounds = [r.simulated for r in records if r.simulated is not None]
    totals = np.cumsum([one.joules for one in rounds])
    whole = len(rounds) == len(records) and np.isfinite(totals).all()
    return totals.tolist() if whole else ()


def _bytes(records: Sequence[RoundRecord]) -> Sequence[float]:
    lost = [0 if r.simulated is None else r.simulated.lost_bytes for r in records]
    sums = [sum(r.link) + more for r, more in zip(records, lost, strict=True)]
    return np.cumsum(sums).tolist() if any(sums) else ()


SECONDS = Quantity("simulated seconds", "s", _seconds)
JOULES = Quantity("energy of the devices", "J", _joules)
BYTES = Quantity("bytes on all links", "B", _bytes)
QUANTITIES = (SECONDS, JOULES, BYTES)


def spent(curve: Curve, quantity: Quantity) -> Values | None:
    """Return what each run has spent by each evaluated round, ``[S, R]``.

    The result is None if a run does not know the quantity, or if its links carried no
    bytes at all.
    """
    rows = [quantity.totals(run.records) for run in curve.runs]
    if not all(map(len, rows)):
        return None
    return np.array([[row[number - 1] for number in curve.rounds] for row in rows])
