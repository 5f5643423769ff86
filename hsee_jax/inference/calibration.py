"""Choose thresholds, compute their results, and measure calibration.

Both answers to every sample of a dataset are computed once. Cumulative sums over the
samples in the order of their uncertainty then give the exact result of every threshold.
A threshold is chosen on samples held out of the training data, never on the test set.

Of several exits the earliest with an uncertainty below the threshold answers. A higher
threshold may move an answer to an earlier exit, so a sample has a step at each exit
that is surer than all before it.

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
    """The quality of all answers to M samples, and the uncertainty of the exits."""

    uncertainty: Floats  # [M], of the last exit
    exit: Judgement  # of the last exit
    server: Judgement
    # Of each exit before it, by depth: its uncertainty [M], and its quality.
    early: tuple[tuple[Floats, Judgement], ...] = ()

    @property
    def exits(self) -> tuple[tuple[Floats, Judgement], ...]:
        """Return the uncertainty and the quality of all E exits, by depth."""
        return (*self.early, (self.uncertainty, self.exit))

    @property
    def lowest(self) -> Floats:
        """Return the lowest uncertainty up to each exit, ``[E, M]``.

        At a threshold above an entry, this exit or one before it answers. An entry is
        infinite where no uncertainty is finite.
        """
        rows = np.stack([own for own, _ in self.exits])
        return np.minimum.accumulate(np.where(np.isfinite(rows), rows, np.inf), axis=0)


class OffloadCurve(NamedTuple):
    """The results of P thresholds on a dataset, ordered by falling offload.

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
      uncertainty: ``[M]`` or ``[E, M]``. No threshold is infinite or NaN.
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
    lowest = scores.lowest
    steps, gains = lowest.ravel(), _gains(scores, lowest).ravel()
    order = np.argsort(steps)
    num_steps = np.searchsorted(steps[order], thresholds, side="left")
    num_correct = scores.server.correct.sum() + np.cumsum([0, *gains[order]])
    last = np.sort(lowest[-1])
    num_offloads = len(last) - np.searchsorted(last, thresholds, side="left")
    return OffloadCurve(
        thresholds,
        num_correct[num_steps],
        num_offloads.astype(np.int64),
        lowest.shape[1],
    )


def _gains(scores: Scores, lowest: Floats) -> Ints:
    """Return by how many right answers each exit's answer changes the one before.

    Args:
      scores: of M samples.
      lowest: see `Scores.lowest`; as a threshold passes it, the exit takes over from
        the next surer one behind it, or from the server.

    Returns:
      ``int64 [E, M]``; 0 where an exit is not surer than all before it.
    """
    answer = scores.server.correct.astype(np.int64)
    gains = np.zeros(lowest.shape, np.int64)
    for e in reversed(range(len(lowest))):
        own = scores.exits[e][1].correct.astype(np.int64)
        surer = lowest[e] < (lowest[e - 1] if e else np.inf)
        gains[e] = np.where(surer, own - answer, 0)
        answer = np.where(surer, own, answer)
    return gains


def exit_shares(scores: Scores, threshold: float) -> Floats:
    """Return the share of samples that each of the E exits answers, ``[E]``."""
    reached = np.sum(scores.lowest < threshold, axis=1)
    return np.diff(reached, prepend=0) / scores.lowest.shape[1]


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
