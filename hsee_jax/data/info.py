"""The properties of the datasets, known before they are read, and sources of them."""

from typing import NamedTuple, Protocol

from hsee_jax.core.types import Dataset


class DatasetInfo(NamedTuple):
    """The properties of a dataset that a network and its input depend on."""

    input_shape: tuple[int, int, int]  # (H, W, C)
    num_classes: int  # K
    mean: tuple[float, ...]  # per channel, over all training samples, scale 0..1
    std: tuple[float, ...]
    # The original label of each class, ascending; None where the labels are 0..K-1.
    label_values: tuple[int, ...] | None = None


PACKAGED = "fashion_mnist_small"
OWN = "npz"  # the user's own dataset, which `arrays.own_info` describes
LABELS = ("refuse", "remap")  # what to do with labels of `OWN` other than 0..K-1

DATASETS = {
    PACKAGED: DatasetInfo((28, 28, 1), 10, (0.2860,), (0.3530,)),
    "fashion_mnist": DatasetInfo((28, 28, 1), 10, (0.2860,), (0.3530,)),
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


class ReadFn(Protocol):
    """Reads a split."""

    def __call__(self, split: str, limit: int | None) -> Dataset:
        """Return the first ``limit`` samples of ``"train"`` or ``"test"``, or all."""


class Source(NamedTuple):
    """A form of a dataset that can be read."""

    name: str  # its form and its place, in words
    read: ReadFn
