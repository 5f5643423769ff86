"""Labels as users have them, and the number of each class."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hsee_jax.core.errors import UserError, one_line, unknown
from hsee_jax.data.info import LABELS

_ALLOWED = "allowed are integers or text [M], or one-hot rows [M, K]"


class Place(NamedTuple):
    """Where data were found, for errors."""

    name: str  # a path, or words
    field: str = "data_dir"  # the option that leads there

    def refusal(self, found: str, allowed: str) -> UserError:
        """Return the error for what was found there."""
        return UserError(f"{self.field}: {self.name} holds {found}; {allowed}")


class Labels(NamedTuple):
    """The labels of a split."""

    values: npt.NDArray[Any]  # [M], of integers or text
    num_classes: int | None = None  # K of one-hot labels; None for others


class Classes(NamedTuple):
    """The original label of each class."""

    values: tuple[Any, ...]  # K, ascending, all int or all str
    natural: bool  # whether they are 0..K-1


def as_array(given: Any, place: Place, allowed: str) -> npt.NDArray[Any]:
    """Return samples or labels as an array of NumPy.

    Raises:
      UserError: NumPy cannot read them, or a mask hides some of the values.
    """
    if isinstance(given, np.ma.MaskedArray) and np.ma.is_masked(given):
        raise place.refusal(
            f"{np.ma.count_masked(given):,} masked values",
            "allowed are arrays without a mask, such as `x.filled(0)`",
        )
    try:
        return np.asarray(given)
    except Exception as error:  # each library raises types of its own
        kind, reason = type(given).__name__, one_line(error)
        raise place.refusal(
            f"a value of type {kind} that NumPy cannot read ({reason})", allowed
        ) from error


def read_labels(given: Any, count: int, place: Place) -> Labels:
    """Check labels, and bring them to one per sample.

    Args:
      given: integers or text ``[M]`` or ``[M, 1]``, or one-hot rows ``[M, K]``.
      count: M, the number of samples.
      place: where they were found.

    Raises:
      UserError: the labels have another type or shape.
    """
    labels = as_array(given, place, _ALLOWED)
    if labels.ndim == 2 and labels.shape[1:] == (1,):
        labels = labels[:, 0]
    if labels.dtype.kind == "O" and all(isinstance(v, str) for v in labels.flat):
        labels = labels.astype(np.str_)
    num_classes = None
    if labels.ndim == 2 and labels.dtype.kind in "biuf" and _is_one_hot(labels):
        num_classes, labels = labels.shape[1], labels.argmax(1)
    for valid, found in (
        (labels.dtype.kind in "biuU", f"labels of type {labels.dtype}"),
        (
            labels.shape == (count,),
            f"labels of the shape {list(labels.shape)} for {count} samples",
        ),
    ):
        if not valid:
            raise place.refusal(found, _ALLOWED)
    labels = labels.astype(np.int64) if labels.dtype.kind == "b" else labels
    return Labels(labels, num_classes)


def classes_of(labels: Labels, place: Place, rule: str) -> Classes:
    """Find the classes of training labels.

    Args:
      labels: of the training samples.
      place: where they were found.
      rule: one of `LABELS`, for integers that are not 0..K-1 without gaps.

    Raises:
      UserError: there is only one class, or the rule refuses the labels.
    """
    if rule not in LABELS:
        raise unknown("labels", rule, LABELS)
    values = tuple(np.unique(labels.values).tolist())
    if len(values) == 1:
        raise place.refusal(
            f"no label but {values[0]}", "allowed are 2 classes or more"
        )
    if labels.num_classes is not None:
        return Classes(tuple(range(labels.num_classes)), natural=True)
    natural = values == tuple(range(len(values)))
    if natural or rule == "remap" or isinstance(values[0], str):
        return Classes(values, natural)
    number, value = next((k, v) for k, v in enumerate(values) if k != v)
    gap = "" if value < 0 else f", but not {number}"
    raise UserError(
        f"labels: {place.name} holds the label {value}{gap}; allowed are 0..K-1 "
        f'without gaps; remap (`--labels remap`, or labels="remap" in Python) maps its '
        f"{len(values)} labels to 0..{len(values) - 1} in ascending order"
    )


def numbers_of(labels: Labels, classes: Classes, place: Place) -> npt.NDArray[np.int32]:
    """Return the class of each sample, ``int32 [M]``.

    Raises:
      UserError: a label is in none of the classes.
    """
    found, places = np.unique(labels.values, return_inverse=True)
    number = {value: k for k, value in enumerate(classes.values)}
    count = len(classes.values)
    for value in found.tolist():
        if value not in number:
            natural = f"allowed are 0..{count - 1}"
            other = f"allowed are the {count} labels of the training samples"
            raise place.refusal(
                f"the label {value}", natural if classes.natural else other
            )
    return np.array([number[value] for value in found.tolist()], np.int32)[places]


def _is_one_hot(labels: npt.NDArray[Any]) -> bool:
    ones = labels == 1
    return bool(((labels == 0) | ones).all() and (ones.sum(1) == 1).all())
