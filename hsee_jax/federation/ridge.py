"""The exact last layer of an exit, from two sums that each client sends once.

After the one-layer federated learning of Fontenla-Romero et al. (SAC 2024) and its
encrypted form FedHEONN (Future Generation Computer Systems, 2023). A client sends the
Gram matrix of the features that its exit's last layer reads, and their product with the
targets; sums over clients are the sums over all samples, so the server's solution is
that of the pooled data, whoever holds which label. The target of a logit is that of the
probability 0.95 for the sample's class and of 0.05 for the others. As both have the
same slope of the sigmoid, all classes share one Gram matrix.

Three things differ: the sums are sent as they are, instead of a singular value
decomposition; the penalty is relative to the variance of the features; and the
intercept is free of it [ours].
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

TARGET = math.log(0.95 / 0.05)  # 2.944, the logit of 0.95
RIDGE = 0.001  # the penalty, relative to the mean variance of a feature


class Sums(NamedTuple):
    """Two sums over samples; F features and a constant 1, K classes."""

    gram: Floats  # [F + 1, F + 1]: of the products of features
    moment: Floats  # [F + 1, K]: of the products of features and targets

    @property
    def samples(self) -> int:
        """Return the number of samples in the sums."""
        return round(float(self.gram[-1, -1]))

    @property
    def nbytes(self) -> int:
        """Return the bytes of a message: one triangle of the Gram matrix is enough."""
        rows = len(self.gram)
        return (rows * (rows + 1) // 2 + self.moment.size) * self.gram.itemsize


def gram(
    features: npt.NDArray[np.floating],
    labels: npt.NDArray[np.integer],
    *,
    num_classes: int,
) -> Sums:
    """Return the sums over some samples of a client.

    Args:
      features: ``[M, F]``, the inputs of the last layer.
      labels: ``[M]``, each in ``0..K-1``.
      num_classes: K.
    """
    ones = np.ones((len(features), 1))
    rows = np.concatenate([features.astype(np.float64), ones], axis=1)
    targets = np.where(labels[:, None] == np.arange(num_classes), TARGET, -TARGET)
    return Sums(rows.T @ rows, rows.T @ targets)


def merge(sums: Sequence[Sums]) -> Sums:
    """Add the sums of clients, one or more.

    Which client holds a sample, and the order, change the result only by rounding.
    """
    return functools.reduce(
        lambda one, other: Sums(one.gram + other.gram, one.moment + other.moment), sums
    )


def solve(sums: Sums, ridge: float = RIDGE) -> tuple[Floats, Floats]:
    """Return the weights ``[F, K]`` and the biases ``[K]`` of the last layer.

    They minimise the squared error of all logits plus a penalty on the squared weights.

    Args:
      sums: over one sample or more.
      ridge: the penalty of a sample, 0 or more, relative to the mean variance of a
        feature. Directions in which the features do not vary get no weight.
    """
    total, count = sums.gram[-1, :-1], sums.gram[-1, -1]
    scatter = sums.gram[:-1, :-1] - np.outer(total, total) / count
    cross = sums.moment[:-1] - np.outer(total, sums.moment[-1]) / count
    penalty = ridge * np.trace(scatter) / len(scatter)
    system = scatter + penalty * np.eye(len(scatter))
    weights = np.linalg.lstsq(system, cross, rcond=None)[0]
    return weights, (sums.moment[-1] - total @ weights) / count
