"""Choose thresholds, compute their results, and measure calibration.

Both answers to every sample of a dataset are computed once. Cumulative sums over the
samples in the order of their uncertainty then give the exact result of every threshold.
A threshold is chosen on samples held out of the training data, never on the test set.

Logits that are not finite count as wrong answers of infinite uncertainty: no threshold
lets an exit answer with them.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hsee_jax.nn.losses import finite_rows, predicted_class

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]
Labels = npt.NDArray[np.int32]

_MARGIN = 1.01  # factor on the largest uncertainty, beyond any rounding error
_BINS = 15


class Judgement(NamedTuple):
    """The quality of one exit's answers to M samples."""

    correct: npt.NDArray[np.bool_]  # [M]
    confidence: Floats  # [M]: the highest probability; NaN where a logit is not finite


class Scores(NamedTuple):
    """The quality of both answers to M samples, and the uncertainty of the exit."""

    uncertainty: Floats  # [M]
    exit: Judgement
    server: Judgement


class OffloadCurve(NamedTuple):
    """The results of P thresholds on a dataset, from most samples at the server on.

    It holds numbers of samples, so that targets are compared without rounding errors.
    """

    thresholds: Floats  # [P], ascending
    num_correct: Ints  # [P]
    num_offloads: Ints  # [P], descending: samples that go to the server
    num_samples: int

    @property
    def accuracy(self) -> Floats:
        """Return the share of right answers, ``float64 [P]``."""
        return self.num_correct / self.num_samples

    @property
    def offload(self) -> Floats:
        """Return the share of samples that go to the server, ``float64 [P]``."""
        return self.num_offloads / self.num_samples


def judge(logits: Floats, labels: Labels) -> Judgement:
    """Compare logits ``[M, K]`` with labels ``[M]``."""
    finite = finite_rows(logits)
    values = np.where(finite[:, None], logits, 0)
    highest = values.max(axis=-1, keepdims=True)
    confidence = 1 / np.exp(values - highest).sum(axis=-1)
    return Judgement(
        predicted_class(logits) == labels, np.where(finite, confidence, np.nan)
    )


def calibration_error(judgement: Judgement) -> float | None:
    """Return the expected calibration error, which compares confidence with accuracy.

    It is the mean over samples of the distance between accuracy and mean confidence in
    the sample's bin. There are 15 bins of equal width (Guo et al., ICML 2017).

    Returns:
      The error, 0..1, or None where a confidence is not finite.
    """
    confidence = judgement.confidence
    if not np.isfinite(confidence).all():
        return None
    bins = np.ceil(confidence * _BINS).astype(int)  # (0, 1/15], (1/15, 2/15] ..
    gaps = np.bincount(bins, judgement.correct - confidence.astype(np.float64))
    return float(np.abs(gaps).sum() / len(bins))


def all_thresholds(uncertainty: Floats, largest: float) -> Floats:
    """Return one threshold for every way to split the samples by their uncertainty.

    Args:
      uncertainty: ``[M]``. Values that are not finite are never thresholds.
      largest: the criterion's largest value.

    Returns:
      ``[P]``, ascending: 0, then every value that occurs except the lowest, then a
      value above ``largest``, so that every finite uncertainty of any sample is below
      it. If no value is finite, 0 is the only threshold.
    """
    values = np.unique(uncertainty[np.isfinite(uncertainty)])
    if not len(values):
        return np.zeros(1)
    return np.array([0.0, *values[1:], _MARGIN * largest])


def offload_curve(scores: Scores, thresholds: Floats) -> OffloadCurve:
    """Return the exact results of a gate on the samples at thresholds ``[P]``."""
    finite = np.isfinite(scores.uncertainty)
    uncertainty = np.where(finite, scores.uncertainty, np.inf)
    order = np.argsort(uncertainty)
    num_exits = np.searchsorted(uncertainty[order], thresholds, side="left")
    gains = scores.exit.correct[order].astype(int) - scores.server.correct[order]
    num_correct = scores.server.correct.sum() + np.cumsum([0, *gains])
    count = len(order)
    return OffloadCurve(thresholds, num_correct[num_exits], count - num_exits, count)


def point_at_accuracy(curve: OffloadCurve, accuracy: float) -> int:
    """Return the index of the lowest offload with at least this accuracy.

    If no point has this accuracy, return the index of the lowest offload with the
    highest accuracy.
    """
    goal = min(accuracy, curve.accuracy.max())
    return int(np.flatnonzero(curve.accuracy >= goal)[-1])


def point_in_budget(curve: OffloadCurve, budget: float, cost: int = 1) -> int:
    """Return the index of the highest offload with a mean cost within a budget.

    If no point is within the budget (the server has to answer the samples that the exit
    cannot), return the index of the lowest offload.

    Args:
      curve: the results of the thresholds.
      budget: the most that a sample may cost on average, 0 or more.
      cost: the cost of a sample that goes to the server, in the budget's unit; with 1
        the budget is a share of the samples.
    """
    # All numbers are integers until one division, which rounds like the text of the
    # budget: equal numbers stay equal. `curve.offload * cost` would round twice.
    mean_cost = curve.num_offloads * cost / curve.num_samples
    affordable = np.flatnonzero(mean_cost <= budget)
    return int(affordable[0]) if len(affordable) else len(mean_cost) - 1
