"""Datasets by name: `dataset_info`, `load_dataset`, and `prepare` to download them.

A name is an entry of `DATASETS`: a known dataset (`known`), a form of the user's own
data (`own`), or what a plugin registers. Every function takes the entry's options by
name, and the folder of the data as ``folder``; None means ``$TFDS_DATA_DIR`` or, where
that variable is not set, ``~/tensorflow_datasets``.
"""

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hsee_jax.core.errors import UserError
from hsee_jax.core.paths import expand_home
from hsee_jax.core.types import Dataset
from hsee_jax.data.arrays import Arrays, convert, limited, raw_of
from hsee_jax.data.download import OnBytes
from hsee_jax.data.info import NO_LIMITS, PACKAGED, Data, DatasetInfo, Limits
from hsee_jax.data.registry import DATASETS, Form

_log = logging.getLogger(__name__)
Folder = str | os.PathLike[str] | None

_NOUNS = {1: "rows", 2: "series", 3: "images"}  # by the rank of a sample


def dataset_info(name: str, *, folder: Folder = None, **options: Any) -> DatasetInfo:
    """Return the shape, classes and normalisation of a dataset; own data are read.

    Args:
      name: a key of `DATASETS`.
      folder: see the module.
      **options: of the entry.

    Raises:
      UserError: there is no dataset of that name, an option is not allowed, the folder
        does not hold the data, or they are not valid.
    """
    form = _form(name, options)
    return form.info or _read(form, _absolute(folder), NO_LIMITS).info


def read_dataset(
    name: str, *, folder: Folder = None, limits: Limits = NO_LIMITS, **options: Any
) -> Data:
    """Read a dataset, and log in one line what was read, from where, and how.

    Args:
      name: a key of `DATASETS`.
      folder: see the module.
      limits: how many samples to return; the others count for `DatasetInfo` only.
      **options: of the entry.

    Raises:
      UserError: see `dataset_info`.
    """
    data = _read(_form(name, options), _absolute(folder), limits)
    if name != PACKAGED:
        _log.info(describe(name, data))
    return data


def load_dataset(
    name: str,
    *,
    folder: Folder = None,
    max_train: int | None = None,
    max_test: int | None = None,
    **options: Any,
) -> tuple[Dataset, Dataset]:
    """Read the training and the test set of a dataset, see `read_dataset`.

    Args:
      name: a key of `DATASETS`.
      folder: see the module.
      max_train: return only the first so many training samples.
      max_test: return only the first so many test samples.
      **options: of the entry.

    Raises:
      UserError: see `dataset_info`.
    """
    limits = Limits(max_train, max_test)
    data = read_dataset(name, folder=folder, limits=limits, **options)
    return data.train, data.test


def read_arrays(
    arrays: Arrays, *, labels: str = "refuse", limits: Limits = NO_LIMITS
) -> Data:
    """Convert arrays of a program to a dataset, and log what was done.

    Args:
      arrays: ``(x, y, x_test, y_test)``, with samples ``[M, ...]``, which the page on
        own data lists, and labels ``[M]`` or one-hot ``[M, K]``.
      labels: what to do with integers that are not 0..K-1 without gaps: ``"refuse"``
        them, or ``"remap"`` them to 0..K-1 in ascending order.
      limits: see `read_dataset`.

    Returns:
      The dataset; its `DatasetInfo` has a digest of all samples and labels.

    Raises:
      UserError: the arrays are not valid.
    """
    data = convert(*raw_of(arrays, "the arrays", "data"), labels=labels)
    notes = ("passed from Python", *data.notes)
    data = limited(data._replace(notes=notes), limits)
    _log.info(describe("arrays", data))
    return data


def prepare(
    name: str,
    *,
    folder: Folder = None,
    on_bytes: OnBytes = lambda file, done, total: None,
    **options: Any,
) -> str:
    """Read a dataset once; download its archive first if no form of it is there.

    Args:
      name: a key of `DATASETS`.
      folder: see the module.
      on_bytes: called with the progress of the download.
      **options: of the entry.

    Returns:
      A line that says what is there.

    Raises:
      UserError: there is no dataset of that name, an option is not allowed, the dataset
        is neither there nor can it be downloaded, or it is not valid.
    """
    form, place = _form(name, options), _absolute(folder)
    there = form.fetch is None or _is_there(form, place)
    if form.fetch is not None and not there:
        form.fetch(place, on_bytes)
    line = describe(name, _read(form, place, NO_LIMITS))
    return f"{'there already' if there else 'downloaded'}: {line}"


def is_there(name: str, folder: Folder = None, **options: Any) -> bool:
    """Return whether a folder holds a dataset; read no samples yet.

    Raises:
      UserError: there is no dataset of that name, an option is not allowed, or the
        folder cannot be read.
    """
    return _is_there(_form(name, options), _absolute(folder))


def describe(name: str, data: Data) -> str:
    """Return a line about a dataset: its sizes, its source, and what was done to it."""
    info = data.info
    classes, values = f"{info.num_classes} classes", info.label_values
    if values is not None:
        classes += f" (labels {values[0]} to {values[-1]}, ascending)"
    what = _NOUNS.get(len(info.input_shape), "samples")
    line = (
        f"{name}: {len(data.train.labels):,} training and {len(data.test.labels):,} "
        f"test {what} of {'x'.join(map(str, info.input_shape))} in {classes}"
    )
    return f"{line}, {'; '.join(data.notes)}"


def _form(name: str, options: dict[str, Any]) -> Form:
    for option, value in options.items():
        if option not in DATASETS.entry(name).options:
            readers = ", ".join(DATASETS.readers(option)) or "no dataset"
            raise UserError(
                f"{option}: {value} has no effect on dataset {name}; it is read by "
                f"{readers}"
            )
    return DATASETS.make(name, options=options)


def _read(form: Form, place: Path, limits: Limits) -> Data:
    with _one_line(place):
        return form.read(place, limits)


def _is_there(form: Form, place: Path) -> bool:
    with _one_line(place):
        return form.is_there(place)


@contextlib.contextmanager
def _one_line(place: Path) -> Iterator[None]:
    """Turn an error of the file system, such as a missing permission, into one line."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise
        raise UserError(
            f"data_dir: {place} cannot be read ({error}); allowed is a folder with "
            "this dataset, whose files you may read"
        ) from error


def _absolute(folder: Folder) -> Path:
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return expand_home(default if folder is None else folder, "data_dir").absolute()
