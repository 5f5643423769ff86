"""What every threshold would give, which one meets a target, and honest confidence.

Both answers to every sample of a dataset are computed once. What a threshold makes of
them is then a matter of sorting and adding, exact for all thresholds. A threshold is
chosen on samples held out of the training data, never on the test set.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Labels = npt.NDArray[np.int32]

_BEYOND = 1.01  # times the largest uncertainty: above it, whatever the rounding
_BINS = 15


class Judged(NamedTuple):
    """One exit's answers to M samples."""

    correct: npt.NDArray[np.bool_]  # [M]
    confidence: Floats  # [M]: the highest probability


class Scores(NamedTuple):
    """Both answers to M samples, and how unsure the first one is."""

    uncertainty: Floats  # [M]
    exit: Judged
    server: Judged


class Curve(NamedTuple):
    """What P thresholds give on a dataset, from all at the server to all on device."""

    thresholds: Floats  # [P], ascending
    accuracy: Floats  # [P]
    offload: Floats  # [P], descending: the share that is sent to the server


def judge(logits: Floats, labels: Labels) -> Judged:
    """Compares logits ``[M, K]`` with labels ``[M]``."""
    best = logits.max(axis=-1, keepdims=True)
    return Judged(
        logits.argmax(axis=-1) == labels, 1 / np.exp(logits - best).sum(axis=-1)
    )


def calibration_error(judged: Judged) -> float:
    """How far confidence is from accuracy: the expected calibration error.

    The mean over samples of the distance between accuracy and mean confidence in the
    sample's bin, of 15 of equal width (Guo et al., ICML 2017).
    """
    bins = np.ceil(judged.confidence * _BINS).astype(int)  # (0, 1/15], (1/15, 2/15] ..
    gaps = np.bincount(bins, judged.correct - judged.confidence.astype(np.float64))
    return float(np.abs(gaps).sum() / len(bins))


def all_thresholds(uncertainty: Floats, largest: float) -> Floats:
    """One threshold for every way to part the samples by their uncertainty, ascending.

    Args:
      uncertainty: ``[M]``.
      largest: that it can be.

    Returns:
      0, then every value that occurs but the lowest, then one that is above the
      largest, so that other samples are below it too; ``[P]``.
    """
    return np.array([0.0, *np.unique(uncertainty)[1:], _BEYOND * largest])


def curve(scores: Scores, thresholds: Floats) -> Curve:
    """Accuracy and offload at thresholds ``[P]``, exactly as a gate would have them."""
    order = np.argsort(scores.uncertainty)
    below = np.searchsorted(scores.uncertainty[order], thresholds, side="left")
    gains = scores.exit.correct[order].astype(int) - scores.server.correct[order]
    correct = scores.server.correct.sum() + np.cumsum([0, *gains])
    count = len(order)
    return Curve(thresholds, correct[below] / count, (count - below) / count)


def reaching(curve: Curve, accuracy: float) -> int:
    """The point of the smallest offload with at least this accuracy.

    Args:
      curve: with such a point.
      accuracy: at most the highest of the curve.
    """
    return int(np.flatnonzero(curve.accuracy >= accuracy)[-1])


def within(curve: Curve, budget: float, cost: float = 1.0) -> int:
    """The point of the largest offload whose cost a sample is within a budget.

    Args:
      curve: whose last point sends nothing.
      budget: 0 or more.
      cost: of a sample that is sent, in the budget's unit; 1 makes it a share.
    """
    return int(np.argmax(curve.offload * cost <= budget))
