"""Ridge regression of accuracy on the features of the cuts."""

import numpy as np

from hsee_jax.systems.cut_features import Inputs, Predict
from hsee_jax.systems.quantities import Bools, Floats

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def solve_ridge(rows: Floats, values: Floats, penalty: float) -> tuple[Floats, float]:
    """Return the weights ``[d]`` and the intercept of a ridge regression.

    They minimise ``|rows w + b - values|^2 + penalty |w|^2``.

    Args:
      rows: ``[n, d]``.
      values: ``[n]``.
      penalty: more than 0; the intercept is free of it.
    """
    centre, mean = rows.mean(axis=0), float(values.mean())
    inner = rows - centre
    gram = inner.T @ inner + penalty * np.eye(rows.shape[1])
    weights = np.linalg.solve(gram, inner.T @ (values - mean))
    return weights, mean - float(centre @ weights)


def fit_ridge(inputs: Inputs, values: Floats, kept: Bools) -> Predict:
    """Fit a ridge regression with the penalty of the least leave-one-out error."""
    rows = _flat(inputs)[kept]
    errors = [left_out_error(rows, values[kept], one) for one in PENALTIES]
    best = PENALTIES[int(np.argmin(errors))]
    weights, intercept = solve_ridge(rows, values[kept], best)
    return lambda inputs: _flat(inputs) @ weights + intercept


def left_out_error(rows: Floats, values: Floats, penalty: float) -> float:
    """Return the mean squared error of leave-one-out, by the closed form."""
    weights, intercept = solve_ridge(rows, values, penalty)
    inner = rows - rows.mean(axis=0)
    gram = inner.T @ inner + penalty * np.eye(rows.shape[1])
    own = 1 / len(rows) + np.sum(inner * np.linalg.solve(gram, inner.T).T, axis=1)
    residuals = values - rows @ weights - intercept
    return float(np.mean((residuals / np.maximum(1 - own, 1e-9)) ** 2))


def _flat(inputs: Inputs) -> Floats:
    """Return the shares of each layer, two sums over the layers, and the settings.

    The sums are the mean share of the FLOPs on a device, and the mean bytes that a
    device sends, relative to the largest output.
    """
    holders, exits, flops, sizes = np.moveaxis(inputs.layers, 2, 0)
    sums = [(holders * flops).sum(axis=1), (exits * sizes).sum(axis=1)]
    return np.concatenate(
        [holders, exits, np.stack(sums, axis=1), inputs.settings], axis=1
    )
