"""Datasets by name: `dataset_info`, `load_dataset`, and `prepare` to download them.

``fashion_mnist_small`` comes with the package: the first 6,000 training and 1,000 test
images of Fashion-MNIST (Xiao et al., arXiv:1708.07747), MIT licence, see
LICENSE-fashion-mnist. ``npz`` is the user's own dataset (`arrays`). Every other dataset
is read from a folder, in the first of these forms that the folder holds: prepared by
tensorflow-datasets (`prepared`), as its authors publish it (`archives`), as arrays
(`arrays`).

Every function takes the folder as ``folder``; None means ``$TFDS_DATA_DIR`` or, if this
variable is not set, ``~/tensorflow_datasets``.
"""

import logging
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Dataset
from hsee_jax.data import archives, arrays, prepared
from hsee_jax.data.download import OnBytes, download_archive
from hsee_jax.data.info import DATASETS, OWN, PACKAGED, DatasetInfo, Source

__all__ = [
    "DATASETS",
    "DatasetInfo",
    "OWN",
    "PACKAGED",
    "Source",
    "dataset_info",
    "find_source",
    "load_dataset",
    "prepare",
]

_log = logging.getLogger(__name__)
Folder = str | os.PathLike[str] | None


def dataset_info(
    name: str, *, folder: Folder = None, labels: str = "refuse"
) -> DatasetInfo:
    """Return the shape, the classes, and the mean and deviation of a dataset.

    Args:
      name: a key of `DATASETS`, or ``npz``; for ``npz`` this reads the training images.
      folder: see the module.
      labels: the rule for the labels of ``npz``, see `load_dataset`.

    Raises:
      UserError: there is no dataset of this name, or ``npz`` is not in the folder or
        not valid.
    """
    _check_name(name)
    if name != OWN:
        return DATASETS[name]
    place = _absolute(folder)
    if arrays.find_own(place, labels) is None:
        raise _missing(name, place)
    return arrays.own_info(place, labels)


def load_dataset(
    name: str,
    *,
    folder: Folder = None,
    max_train: int | None = None,
    max_test: int | None = None,
    labels: str = "refuse",
) -> tuple[Dataset, Dataset]:
    """Read the training and the test samples, ``uint8 [M, H, W, C]``, ``int32 [M]``.

    Log a line about the samples and their source.

    Args:
      name: see `dataset_info`.
      folder: see the module.
      max_train: the most training samples to return, the first of the dataset.
      max_test: the most test samples to return, the first of the dataset.
      labels: what to do if the training labels of ``npz`` are not 0..K-1 without gaps:
        ``"refuse"`` them, or ``"remap"`` them to 0..K-1 in ascending order, see
        `DatasetInfo`.

    Raises:
      UserError: there is no dataset of this name, the folder does not hold it, or it is
        not valid.
    """
    train, test, line = _read(name, folder, labels, max_train, max_test)
    if name != PACKAGED:
        _log.info(line)
    return train, test


def prepare(
    name: str,
    *,
    folder: Folder = None,
    labels: str = "refuse",
    on_bytes: OnBytes = lambda file, done, total: None,
) -> str:
    """Read a dataset once; first download its archive if the folder lacks the dataset.

    Args:
      name: see `dataset_info`.
      folder: see the module.
      labels: see `load_dataset`.
      on_bytes: called with the progress of the download.

    Returns:
      A line that describes the dataset and its source.

    Raises:
      UserError: the folder does not hold the dataset and it cannot be downloaded, or it
        is not valid.
    """
    there = find_source(name, folder, labels=labels) is not None
    if not there and name in archives.ARCHIVES:
        download_archive(archives.ARCHIVES[name], _absolute(folder), on_bytes)
    line = _read(name, folder, labels)[2]
    return f"{'there already' if there else 'downloaded'}: {line}"


def find_source(
    name: str, folder: Folder = None, *, labels: str = "refuse"
) -> Source | None:
    """Find the form of a dataset in the folder, if any; read no samples yet.

    Raises:
      UserError: there is no dataset of this name.
    """
    return _find(name, folder, labels)[0]


def _find(name: str, folder: Folder, labels: str) -> tuple[Source | None, list[str]]:
    """Return the source, and clauses that say why prepared versions cannot be read."""
    _check_name(name)
    place = _absolute(folder)
    if name == PACKAGED:
        return Source("the package", _packaged), []
    if name == OWN:
        return arrays.find_own(place, labels), []
    source, passed = prepared.find(name, place)
    return source or archives.find(name, place) or arrays.find(name, place), passed


def _absolute(folder: Folder) -> Path:
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(folder or default).expanduser().absolute()


def _read(
    name: str,
    folder: Folder,
    labels: str,
    max_train: int | None = None,
    max_test: int | None = None,
) -> tuple[Dataset, Dataset, str]:
    """Return training samples, test samples, and a line about them."""
    source, passed = _find(name, folder, labels)
    if source is None:
        raise _missing(name, _absolute(folder), passed)
    train, test = source.read("train", max_train), source.read("test", max_test)
    info = dataset_info(name, folder=folder, labels=labels)
    classes, values = f"{info.num_classes} classes", info.label_values
    if values is not None:
        classes += f" (labels {values[0]} to {values[-1]}, ascending)"
    line = (
        f"{name}: {len(train.labels):,} training and {len(test.labels):,} test images "
        f"of {'x'.join(map(str, info.input_shape))} in {classes}, from {source.name}"
    )
    return train, test, "; ".join((line, *passed))


def _check_name(name: str) -> None:
    if name not in (*DATASETS, OWN):
        raise UserError(
            f"dataset: {name} is unknown; allowed are {', '.join((*DATASETS, OWN))}"
        )


def _missing(name: str, folder: Path, passed: Sequence[str] = ()) -> UserError:
    if name == OWN:
        return UserError(
            f"data_dir: {folder} is not allowed for {OWN}; allowed is a folder with "
            "train.npz and test.npz, each with `images` and `labels`"
        )
    clauses = (
        f"data_dir: {folder} holds no {name} that can be read here",
        *passed,
        f"`hsee data {name}` downloads it",
        f"allowed are also {name}/train.npz and test.npz, and what `tfds build "
        f"--file_format=array_record {name}` makes (as tfrecord it needs the extra tf)",
    )
    return UserError("; ".join(clauses))


def _packaged(split: str, limit: int | None) -> Dataset:
    path = resources.files("hsee_jax.data") / "fashion_mnist_small.npz"
    with path.open("rb") as file, np.load(file, allow_pickle=False) as contents:
        images, labels = contents[f"{split}_images"], contents[f"{split}_labels"]
    return Dataset(images[:limit, :, :, None], labels[:limit].astype(np.int32))
