"""Datasets in the format of NumPy: ``train.npz`` and ``test.npz`` in a folder.

Each file holds ``images``, uint8 ``[M, H, W, C]``, and ``labels``, integers ``[M]``.
The folder holds the user's own dataset, or has the name of a key of `DATASETS`.
"""

import functools
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Dataset
from hsee_jax.data.info import DATASETS, LABELS, DatasetInfo, Source

_ALLOWED = "allowed are `images`, uint8 [M, H, W, C], and `labels`, integers [M]"
Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[Any]  # of any integer type


def find(dataset: str, folder: Path) -> Source | None:
    """Find both files of a dataset in `DATASETS`; return None if one is missing."""
    return _source(folder / dataset, lambda: DATASETS[dataset])


def find_own(folder: Path, labels: str) -> Source | None:
    """Find both files of the user's own dataset; return None if one is missing."""
    return _source(folder, lambda: own_info(folder, labels))


def own_info(folder: Path, labels: str) -> DatasetInfo:
    """Read shape, classes, and mean and deviation of each channel from ``train.npz``.

    Args:
      folder: the folder of the file.
      labels: ``"refuse"`` labels that are not 0..K-1 without gaps, or ``"remap"`` them.

    Raises:
      UserError: the content is not valid, or the labels are refused.
    """
    if labels not in LABELS:
        raise UserError(f"labels: {labels} is unknown; allowed are {', '.join(LABELS)}")
    path = folder / "train.npz"
    return _own_info(path, path.stat().st_mtime_ns, labels)


@functools.lru_cache(maxsize=1)
def _own_info(path: Path, changed: int, labels: str) -> DatasetInfo:
    """Read the file again only if it has changed."""
    del changed
    images, given = _load(path)
    values = _label_values(path, given)
    natural = values == tuple(range(len(values)))
    if not natural and labels != "remap":
        raise _not_natural(path, values)
    _, height, width, channels = images.shape
    scale = np.arange(256) / 255
    means, deviations = [], []
    for pixels in images.reshape(-1, channels).T:
        shares = np.bincount(pixels, minlength=256) / len(pixels)
        means.append(float(shares @ scale))
        # A constant channel has the deviation 1, so that no division is by zero.
        deviations.append(float(np.sqrt(shares @ (scale - means[-1]) ** 2)) or 1.0)
    return DatasetInfo(
        (height, width, channels),
        len(values),
        mean=tuple(means),
        std=tuple(deviations),
        label_values=None if natural else values,
    )


def _label_values(path: Path, labels: Labels) -> tuple[int, ...]:
    """Return the label of each class, ascending."""
    values = tuple(np.unique(labels).tolist())
    if len(values) == 1:
        raise UserError(
            f"data_dir: {path} holds no label but {values[0]}; allowed are 2 classes "
            "or more"
        )
    return values


def _not_natural(path: Path, values: tuple[int, ...]) -> UserError:
    """Return the error that names the first label outside of 0..K-1 without gaps."""
    number, value = next((k, v) for k, v in enumerate(values) if k != v)
    gap = "" if value < 0 else f", but not {number}"
    return UserError(
        f"labels: {path} holds the label {value}{gap}; allowed are 0..K-1 without "
        f"gaps; `--labels remap` maps its {len(values)} labels to "
        f"0..{len(values) - 1} in ascending order"
    )


def _source(folder: Path, info_fn: Callable[[], DatasetInfo]) -> Source | None:
    if not all((folder / f"{split}.npz").is_file() for split in ("train", "test")):
        return None

    def read(split: str, limit: int | None) -> Dataset:
        info, path = info_fn(), folder / f"{split}.npz"
        images, labels = _load(path)
        if images.shape[1:] != info.input_shape:
            raise UserError(
                f"data_dir: {path} holds images of {list(images.shape[1:])}; allowed "
                f"are {list(info.input_shape)}"
            )
        return Dataset(images[:limit], _classes(path, labels, info)[:limit])

    return Source(f"train.npz and test.npz in {folder}", read)


def _classes(path: Path, labels: Labels, info: DatasetInfo) -> npt.NDArray[np.int32]:
    """Return the class of each sample, ``int32 [M]``."""
    values, places = np.unique(labels, return_inverse=True)
    known = range(info.num_classes) if info.label_values is None else info.label_values
    number = {value: k for k, value in enumerate(known)}
    for value in values.tolist():
        if value not in number:
            allowed = f"0..{info.num_classes - 1}"
            if info.label_values is not None:
                allowed = f"the {info.num_classes} labels of train.npz"
            raise UserError(
                f"data_dir: {path} holds the label {value}; allowed are {allowed}"
            )
    return np.array([number[value] for value in values.tolist()], np.int32)[places]


def _load(path: Path) -> tuple[Images, Labels]:
    """Read the images and labels of a file, and check their types and shapes."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except (
        OSError,
        EOFError,
        KeyError,
        TypeError,
        ValueError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(f"data_dir: {path} cannot be read: {error}; {_ALLOWED}") from (
            error
        )
    checks = (
        (images.dtype == np.uint8, f"images of type {images.dtype}"),
        (images.ndim == 4, f"images of the shape {list(images.shape)}"),
        (images.shape[:1] != (0,), "0 images"),
        (images.size > 0, f"images of 0 pixels, {list(images.shape)}"),
        (labels.dtype.kind in "iu", f"labels of type {labels.dtype}"),
        (
            labels.shape == images.shape[:1],
            f"labels of the shape {list(labels.shape)} for images of the shape "
            f"{list(images.shape)}",
        ),
    )
    for valid, found in checks:
        if not valid:
            raise UserError(f"data_dir: {path} holds {found}; {_ALLOWED}")
    return images, labels
