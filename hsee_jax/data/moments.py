"""Mean and deviation of samples, and what float32 cannot hold of them."""

from typing import Any

import numpy as np
import numpy.typing as npt

from hsee_jax.data.info import Figures
from hsee_jax.data.labels import Place

Samples = npt.NDArray[Any]

_FLOAT32 = np.finfo(np.float32)
# The largest error of rounding to float32 that is allowed, in deviations of a column.
_MAX_ERROR = 1 / 16
_SLICE = 2**20  # pixels that are counted at once


def check_rounding(given: Samples, samples: Samples, place: Place) -> None:
    """Refuse samples that lose their differences when they become float32.

    Args:
      given: the samples ``[M, ..., F]`` as they were found.
      samples: the same in float32.
      place: where they were found.

    Raises:
      UserError: rounding moves a value of a column that is not constant by more than
        1/16 of the column's deviation.
    """
    if np.can_cast(given.dtype, samples.dtype):
        return
    exact, rounded = (a.reshape(-1, a.shape[-1]) for a in (given, samples))
    errors = rounded.astype(np.float64)
    np.abs(np.subtract(exact, errors, out=errors), out=errors)
    error = errors.max(0)
    deviation = exact.std(0, dtype=np.float64)
    lossy = (exact.min(0) != exact.max(0)) & (error > _MAX_ERROR * deviation)
    if lossy.any():
        first = int(np.argmax(lossy))
        raise place.refusal(
            f"values with the deviation {deviation[first]:.3g} in "
            f"{_column(first, samples)}, which float32 rounds by up to "
            f"{error[first]:.3g}",
            "allowed are values that float32 keeps apart; subtract an offset, such as "
            "the mean, first",
        )


def moments(samples: Samples, place: Place) -> tuple[Figures, Figures]:
    """Return mean and deviation of each entry of the last axis.

    Samples of uint8 are scaled to 0..1 first. The deviation of a constant is 1, so that
    no division is by zero.

    Args:
      samples: ``uint8`` or ``float32 [M, ..., F]``.
      place: where they were found.

    Raises:
      UserError: the range or the deviation is too large or too small for float32.
    """
    flat = samples.reshape(-1, samples.shape[-1])
    if samples.dtype == np.uint8:
        return _pixel_moments(flat)
    low, high = (bound.astype(np.float64) for bound in (flat.min(0), flat.max(0)))
    mean, deviation = (f(0, dtype=np.float64) for f in (flat.mean, flat.std))
    constant = low == high
    too_wide, too_narrow = high - low > _FLOAT32.max, deviation < _FLOAT32.tiny
    wrong = ~constant & (too_wide | too_narrow)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise place.refusal(
            f"values from {low[first]:.3g} to {high[first]:.3g} in "
            f"{_column(first, samples)}",
            f"allowed are a range up to {_FLOAT32.max:.2g} and a deviation from "
            f"{_FLOAT32.tiny:.2g}",
        )
    return tuple(mean.tolist()), tuple(np.where(constant, 1.0, deviation).tolist())


def _pixel_moments(flat: Samples) -> tuple[Figures, Figures]:
    """Return mean and deviation of each channel of pixels, scaled to 0..1."""
    scale = np.arange(256) / 255
    means, deviations = [], []
    for pixels in flat.T:
        counts = np.zeros(256, np.int64)
        for start in range(0, len(pixels), _SLICE):  # it makes int64 of each
            counts += np.bincount(pixels[start : start + _SLICE], minlength=256)
        shares = counts / len(pixels)
        means.append(float(shares @ scale))
        deviations.append(float(np.sqrt(shares @ (scale - means[-1]) ** 2)) or 1.0)
    return tuple(means), tuple(deviations)


def _column(number: int, samples: Samples) -> str:
    """Name an entry of the last axis."""
    return (
        f"column {number}"
        if samples.ndim == 2
        else f"the entries {number} of the last axis"
    )
