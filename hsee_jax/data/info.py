"""What is known of a dataset, and the types in which it is read."""

import math
from typing import NamedTuple, Protocol

from hsee_jax.core.types import Dataset

Figures = tuple[float, ...]  # one for each entry of the last axis


class DatasetInfo(NamedTuple):
    """The properties of a dataset that a network and its input depend on."""

    input_shape: tuple[int, ...]  # of a sample: (H, W, C) for images
    num_classes: int  # K
    # Of each entry of the last axis, over all training samples; images of uint8 are
    # scaled to 0..1 first.
    mean: Figures
    std: Figures
    # The original label of each class, ascending; None where the labels are 0..K-1.
    label_values: tuple[int, ...] | tuple[str, ...] | None = None
    dtype: str = "uint8"  # of the stored samples: uint8 for images, or float32
    digest: str | None = None  # of all samples and labels, if they are the user's own


def difference(one: DatasetInfo, other: DatasetInfo) -> str | None:
    """Return the name of the first property in which datasets differ, or None.

    If both have a digest, it decides whether the data are equal. Otherwise, as for runs
    of older versions, mean and deviation decide; they are compared up to rounding, as
    their last digits depend on the order of a sum.
    """
    by_digest = one.digest is not None and other.digest is not None
    for name in one._fields:
        ours, theirs = getattr(one, name), getattr(other, name)
        if name in ("mean", "std"):
            same = by_digest or _are_close(ours, theirs, one.std)
        else:
            same = ours == theirs or (name == "digest" and not by_digest)
        if not same:
            return name
    return None


def _are_close(ours: Figures, theirs: Figures, deviations: Figures) -> bool:
    """Compare figures up to rounding, relative to the deviation for a mean near 0."""
    return len(ours) == len(theirs) and all(
        math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6 * deviation)
        for a, b, deviation in zip(ours, theirs, deviations, strict=True)
    )


PACKAGED = "fashion_mnist_small"
LABELS = ("refuse", "remap")  # what to do with integer labels other than 0..K-1

_FASHION = DatasetInfo((28, 28, 1), 10, (0.2860,), (0.3530,))
KNOWN = {
    PACKAGED: _FASHION,
    "fashion_mnist": _FASHION,
    "mnist": DatasetInfo((28, 28, 1), 10, (0.1307,), (0.3081,)),
    "cifar10": DatasetInfo(
        (32, 32, 3), 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    ),
    "cifar100": DatasetInfo(
        (32, 32, 3), 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
    "stl10": DatasetInfo(
        (96, 96, 3), 10, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)
    ),
}


class Data(NamedTuple):
    """A dataset that has been read."""

    train: Dataset
    test: Dataset
    info: DatasetInfo
    # Clauses that say where it is from, and what was done to it.
    notes: tuple[str, ...] = ()


class Limits(NamedTuple):
    """How many samples to keep, the first of each split; None keeps all."""

    train: int | None = None
    test: int | None = None


NO_LIMITS = Limits()


class ReadFn(Protocol):
    """Reads a split."""

    def __call__(self, split: str, limit: int | None) -> Dataset:
        """Return the first ``limit`` samples of ``"train"`` or ``"test"``, or all."""


class Source(NamedTuple):
    """A form of a known dataset that can be read."""

    name: str  # its form and its place, in words
    read: ReadFn


# Training samples of the known datasets, so that a plan of their use needs no data.
TRAIN_SAMPLES = {
    PACKAGED: 6_000,
    "fashion_mnist": 60_000,
    "mnist": 60_000,
    "cifar10": 50_000,
    "cifar100": 50_000,
    "stl10": 5_000,
}
