"""Intervals of time: the bars of a picture, and the seconds that they cover."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hsee_jax.systems.quantities import Floats


class Span(NamedTuple):
    """The times of one kind of activity; NaN where there is none."""

    kind: str
    start_s: Floats  # [S, N]: of batch or average s of client i
    end_s: Floats  # [S, N]
    worker: npt.NDArray[np.int64] | None = None  # [S, N]: of the server; None: a client


class Interval(NamedTuple):
    """One bar of a picture."""

    kind: str
    client: int
    worker: int | None  # of the server; None on the client's own row
    start_s: float
    end_s: float


def intervals(spans: Iterable[Span], clients: Sequence[int]) -> Iterator[Interval]:
    """Yield the bars of some clients, except bars without length."""
    for span in spans:
        for client in clients:
            starts, ends = span.start_s[:, client], span.end_s[:, client]
            for step in np.flatnonzero(ends > starts).tolist():
                worker = None
                if span.worker is not None:
                    worker = int(span.worker[step, client])
                yield Interval(
                    span.kind, client, worker, float(starts[step]), float(ends[step])
                )


def union_s(spans: Iterable[Span]) -> Floats:
    """Return the seconds that at least one of the spans covers, ``[N]``."""
    listed = list(spans)
    starts = np.nan_to_num(np.concatenate([span.start_s for span in listed]))
    ends = np.nan_to_num(np.concatenate([span.end_s for span in listed]))
    order = np.argsort(starts, axis=0, kind="stable")
    starts = np.take_along_axis(starts, order, axis=0)
    ends = np.take_along_axis(ends, order, axis=0)
    covered = np.maximum.accumulate(ends, axis=0)
    before = np.vstack([np.zeros_like(covered[:1]), covered[:-1]])
    return np.sum(np.maximum(ends - np.maximum(starts, before), 0.0), axis=0)


def busy_before(starts: Floats, ends: Floats) -> Callable[[Floats], Floats]:
    """Return a function from times to the seconds before them that intervals cover.

    Args:
      starts: ``[K]``, in any order; the intervals may overlap.
      ends: ``[K]``.
    """
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    # An interval that overlaps the ones before it begins where they end.
    before = np.concatenate([starts[:1], ends[:-1]])
    starts = np.minimum(np.maximum(starts, before), ends)
    edges = np.stack([starts, ends], axis=1).ravel()
    covered = np.cumsum(np.stack([np.zeros_like(starts), ends - starts], axis=1))
    if not len(edges):
        return np.zeros_like
    return lambda times: np.interp(times, edges, covered)
