"""Datasets in NumPy's own format: a user's ``train.npz`` and ``test.npz``.

Each holds ``images``, uint8 ``[M, H, W, C]``, and ``labels``, whole numbers ``[M]``
from 0. Those of a dataset that is known by name lie in a folder of that name.
"""

import functools
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hsee_jax.core.types import Dataset
from hsee_jax.core.errors import UserError
from hsee_jax.data.info import DATASETS, OWN, DatasetInfo, Source

_ALLOWED = (
    "allowed are `images`, uint8 [M, H, W, C], and `labels`, whole numbers [M] from 0"
)


def find(dataset: str, folder: Path) -> Source | None:
    """The two files of a dataset, if both are there."""
    place = folder if dataset == OWN else folder / dataset
    if not all((place / f"{split}.npz").is_file() for split in ("train", "test")):
        return None

    def read(split: str, limit: int | None) -> Dataset:
        info = own_info(place) if dataset == OWN else DATASETS[dataset]
        path = place / f"{split}.npz"
        images, labels = _load(path)
        if images.shape[1:] != info.input_shape:
            raise UserError(
                f"data_dir: {path} holds images of {list(images.shape[1:])}; allowed "
                f"are {list(info.input_shape)}"
            )
        if labels.max() >= info.num_classes:
            raise UserError(
                f"data_dir: {path} holds a label {labels.max()}; allowed are "
                f"0..{info.num_classes - 1}"
            )
        return Dataset(images[:limit], labels[:limit].astype(np.int32))

    return Source(f"train.npz and test.npz in {place}", read)


def own_info(folder: Path) -> DatasetInfo:
    """What ``train.npz`` tells: its shape, and mean and deviation of its images.

    There are as many classes as its largest label tells.

    Raises:
      UserError: the content is not as it must be.
    """
    path = folder / "train.npz"
    return _own_info(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _own_info(path: Path, changed: int) -> DatasetInfo:
    """Reads it again only if it has changed."""
    del changed
    images, labels = _load(path)
    _, height, width, channels = images.shape
    values = np.arange(256) / 255
    means, deviations = [], []
    for pixels in images.reshape(-1, channels).T:
        shares = np.bincount(pixels, minlength=256) / len(pixels)
        means.append(float(shares @ values))
        # a channel that is constant is not divided by zero
        deviations.append(float(np.sqrt(shares @ (values - means[-1]) ** 2)) or 1.0)
    return DatasetInfo(
        (height, width, channels),
        int(labels.max()) + 1,
        mean=tuple(means),
        std=tuple(deviations),
    )


def _load(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
    """Images and labels of a file, of the right types and ranks."""
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
    if not (
        images.dtype == np.uint8
        and images.ndim == 4
        and images.size > 0
        and labels.dtype.kind in "iu"
        and labels.shape == images.shape[:1]
        and labels.min() >= 0
    ):
        raise UserError(
            f"data_dir: {path} holds images, {images.dtype} {list(images.shape)}, and "
            f"labels, {labels.dtype} {list(labels.shape)}; {_ALLOWED}"
        )
    return images, labels
