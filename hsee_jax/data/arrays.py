"""Turn arrays as users have them into a dataset: check, convert and describe them.

Samples of uint8 or uint16 with the shape ``[M, H, W]`` or ``[M, H, W, C]`` are images;
images of uint8 stay uint8. All other numbers become float32: features ``[M, F]``,
series ``[M, T, F]``, images ``[M, H, W, C]``. Labels are integers or text ``[M]``, or
one-hot rows ``[M, K]``.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Dataset
from hsee_jax.data.info import Data, DatasetInfo, Limits
from hsee_jax.data.labels import (
    Classes,
    Place,
    as_array,
    classes_of,
    numbers_of,
    read_labels,
)
from hsee_jax.data.moments import Samples, check_rounding, moments
from hsee_jax.data.registry import Form

# x, y, x_test, y_test: samples [M, ...] and labels [M] of both splits.
Arrays = tuple[Any, Any, Any, Any]

_ALLOWED = (
    "allowed are numbers [M, ...], such as images [M, H, W, C], features [M, F] or "
    "series [M, T, F]"
)


class Raw(NamedTuple):
    """The samples and labels of a split, as they were found."""

    samples: Any  # [M, ...]
    labels: Any  # [M] or [M, K]
    place: Place


def from_arrays(
    load: Callable[[Path], Arrays],
    *,
    labels: str = "refuse",
    is_there: Callable[[Path], bool] = Path.is_dir,
) -> Form:
    """Make an entry of `DATASETS` from a function that returns arrays.

    Args:
      load: reads the folder of ``--data-dir``, and returns ``(x, y, x_test, y_test)``.
      labels: what to do with integers that are not 0..K-1 without gaps: ``"refuse"``
        them, or ``"remap"`` them to 0..K-1 in ascending order.
      is_there: whether a folder holds the dataset.
    """

    def read(folder: Path, limits: Limits) -> Data:
        arrays = four(load(folder), "dataset", f" as the result of {_name(load)}")
        data = convert(*raw_of(arrays, str(folder)), labels=labels)
        return limited(data._replace(notes=(f"from {folder}", *data.notes)), limits)

    return Form(read, is_there)


def four(given: Any, field: str, role: str = "") -> Arrays:
    """Return x, y, x_test and y_test.

    Args:
      given: these four, or the training and the test set, each as a `Dataset`.
      field: the option or argument that gave them, for errors.
      role: a further clause for errors.

    Raises:
      UserError: they are neither four values nor two datasets.
    """
    try:
        parts = tuple(given)
    except TypeError as error:
        raise _not_four(f"{type(given).__name__} is", field, role) from error
    if len(parts) == 2 and all(isinstance(part, Dataset) for part in parts):
        parts = (*parts[0], *parts[1])
    if len(parts) != 4:
        raise _not_four(f"{len(parts)} values are", field, role)
    return parts


def _not_four(found: str, field: str, role: str) -> UserError:
    return UserError(
        f"{field}: {found} not allowed{role}; allowed are (x, y, x_test, y_test), or "
        "two Datasets"
    )


def _name(load: Callable[[Path], Arrays]) -> str:
    return getattr(load, "__name__", "the function")


def raw_of(arrays: Arrays, name: str, field: str = "data_dir") -> tuple[Raw, Raw]:
    """Return the training and the test set, each with a name for errors."""
    x, y, x_test, y_test = four(arrays, field)
    return (
        Raw(x, y, Place(f"the training set of {name}", field)),
        Raw(x_test, y_test, Place(f"the test set of {name}", field)),
    )


def convert(train: Raw, test: Raw, *, labels: str = "refuse") -> Data:
    """Check and convert the arrays of a dataset.

    Args:
      train: the training samples, which give classes, mean and deviation.
      test: the test samples.
      labels: what to do with integers that are not 0..K-1 without gaps: ``"refuse"``
        them, or ``"remap"`` them to 0..K-1 in ascending order.

    Returns:
      The dataset, with a digest of all samples and labels in its `DatasetInfo`; its
      notes name every conversion.

    Raises:
      UserError: the arrays are not valid, or the splits do not fit together.
    """
    samples, notes = _samples(train)
    own = read_labels(train.labels, len(samples), train.place)
    classes = classes_of(own, train.place, labels)
    if own.num_classes is not None:
        notes.append("a one-hot label becomes the place of its 1")
    check_rounding(np.asarray(train.samples), samples, train.place)
    mean, std = moments(samples, train.place)
    info = DatasetInfo(
        samples.shape[1:],
        len(classes.values),
        mean,
        std,
        None if classes.natural else classes.values,
        samples.dtype.name,
    )
    data = Data(
        Dataset(samples, numbers_of(own, classes, train.place)),
        _fitting(test, info, classes),
        info,
        tuple(notes),
    )
    return data._replace(info=info._replace(digest=digest(data)))


def as_known(raw: Raw, info: DatasetInfo) -> Dataset:
    """Check and convert a split of a dataset whose properties are known.

    Raises:
      UserError: the arrays are not valid, or belong to another dataset.
    """
    return _fitting(raw, info, Classes(tuple(range(info.num_classes)), natural=True))


def limited(data: Data, limits: Limits) -> Data:
    """Keep only the first samples of each split."""
    train, test = (
        Dataset(split.images[:limit], split.labels[:limit])
        for split, limit in zip((data.train, data.test), limits, strict=True)
    )
    return data._replace(train=train, test=test)


def digest(data: Data) -> str:
    """Return the SHA-256 of all samples and labels, hexadecimal."""
    total = hashlib.sha256()
    for array in (*data.train, *data.test):
        total.update(f"{array.dtype} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


def _fitting(raw: Raw, info: DatasetInfo, classes: Classes) -> Dataset:
    """Convert a split; refuse samples that differ in form from the training set."""
    samples, _ = _samples(raw)
    for found, allowed in (
        (list(samples.shape[1:]), list(info.input_shape)),
        (samples.dtype.name, info.dtype),
    ):
        if found != allowed:
            raise raw.place.refusal(f"samples of {found}", f"allowed are {allowed}")
    labels = read_labels(raw.labels, len(samples), raw.place)
    count = len(classes.values)
    if labels.num_classes is not None and (
        labels.num_classes != count or not classes.natural
    ):
        of = f"of {count} columns" if classes.natural else "labels as in training"
        raise raw.place.refusal(
            f"one-hot rows of {labels.num_classes} columns", f"allowed are {of}"
        )
    return Dataset(samples, numbers_of(labels, classes, raw.place))


def _samples(raw: Raw) -> tuple[Samples, list[str]]:
    """Check and convert samples; return also what was done, in clauses.

    The result is in C order, so that equal samples have equal sums.
    """
    samples, notes = as_array(raw.samples, raw.place, _ALLOWED), []
    for valid, found in (
        (samples.dtype.kind in "biuf", f"samples of type {samples.dtype}"),
        (samples.ndim >= 2, f"samples of the shape {list(samples.shape)}"),
        (samples.shape[:1] != (0,), "0 samples"),
        (samples.size > 0, f"samples of 0 numbers, {list(samples.shape)}"),
    ):
        if not valid:
            raise raw.place.refusal(found, _ALLOWED)
    samples = np.ascontiguousarray(samples, samples.dtype.newbyteorder("="))
    if samples.dtype in (np.uint8, np.uint16) and samples.ndim == 3:
        samples = samples[..., None]
        notes.append("grey images [M, H, W] get one channel")
    if samples.dtype == np.uint8 and samples.ndim == 4:
        return samples, notes
    if samples.dtype != np.float32:
        notes.append(f"{samples.dtype} becomes float32")
    with np.errstate(over="ignore"):  # what is infinite then is refused
        samples = samples.astype(np.float32, copy=False)
    finite = np.isfinite(samples)
    if not finite.all():
        first = np.unravel_index(np.argmin(finite), finite.shape)
        raise raw.place.refusal(
            f"{finite.size - np.count_nonzero(finite):,} values that are NaN or "
            f"infinite in float32, the first at {list(map(int, first))}",
            "allowed are finite numbers",
        )
    return samples, notes
