"""Read known datasets as torchvision unpacks them, below the folder of all datasets.

CIFAR lies there as pickles, in ``cifar-10-batches-py`` and ``cifar-100-python``; MNIST
and Fashion-MNIST as idx files, in ``MNIST/raw`` and ``FashionMNIST/raw``, packed by
gzip or not. A file cannot run code, see `pickles`, and holds what `KNOWN` says of its
dataset.
"""

import gzip
import pickle
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hsee_jax.core.errors import UserError, one_line
from hsee_jax.core.types import Dataset
from hsee_jax.data import pickles
from hsee_jax.data.arrays import Raw, as_known
from hsee_jax.data.info import KNOWN, DatasetInfo, Source
from hsee_jax.data.labels import Place

_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    RecursionError,
    struct.error,
    zlib.error,
    pickle.UnpicklingError,
)


class _Layout(NamedTuple):
    """The files of a dataset."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    parse: Callable[[list[Path], DatasetInfo], Dataset]


def find(dataset: str, folder: Path) -> Source | None:
    """Find all files of a dataset; return None if one is missing."""
    layout = _LAYOUTS.get(dataset)
    if layout is None:
        return None
    place = folder / layout.folder
    if not all(_path(place / name) for name in (*layout.train, *layout.test)):
        return None

    def read(split: str, limit: int | None) -> Dataset:
        names = layout.train if split == "train" else layout.test
        paths = [_path(place / name) or place for name in names]
        images, labels = layout.parse(paths, KNOWN[dataset])
        return Dataset(images[:limit], labels[:limit])

    return Source(f"the files of torchvision in {place}", read)


def _path(path: Path) -> Path | None:
    """Return the path of a file, as it is or packed by gzip."""
    packed = path.with_name(f"{path.name}.gz")
    return next((found for found in (path, packed) if found.is_file()), None)


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == ".gz" else content


def _refusal(path: Path, reason: object) -> UserError:
    return UserError(
        f"data_dir: {path} cannot be read ({one_line(reason)}); allowed is the file as "
        "torchvision unpacks it"
    )


def _cifar(paths: list[Path], info: DatasetInfo, *, labels: str) -> Dataset:
    """Parse pickled dictionaries of rows, 3 colour planes of 32x32, and labels."""
    images, numbers = [], []
    for path in paths:
        try:
            batch = pickles.load(_content(path))
            batch = {pickles.text_of(key): value for key, value in batch.items()}
            planes = np.asarray(batch["data"]).reshape(-1, 3, 32, 32)
            found = np.asarray(batch[labels])
            if planes.dtype != np.uint8 or found.shape != planes.shape[:1]:
                raise ValueError(
                    f"it holds {planes.dtype} {planes.shape} {found.shape}"
                )
        except _ERRORS as error:
            raise _refusal(path, error) from error
        raw = Raw(planes.transpose(0, 2, 3, 1), found, Place(str(path)))
        own = as_known(raw, info)
        images.append(own.images)
        numbers.append(own.labels)
    return Dataset(np.concatenate(images), np.concatenate(numbers))


def _idx(paths: list[Path], info: DatasetInfo) -> Dataset:
    """Parse the images and the labels of MNIST's idx format."""
    images, labels = (_idx_array(path) for path in paths)
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise _refusal(paths[0], f"{images.shape} images with {labels.shape} labels")
    return as_known(Raw(images, labels, Place(str(paths[0].parent))), info)


def _idx_array(path: Path) -> Any:
    """Parse a magic number, 0x8 and the rank, big-endian sizes, then the bytes."""
    try:
        content = _content(path)
        magic, *_ = struct.unpack_from(">I", content)
        if magic >> 8 != 8:
            raise ValueError(f"it begins with {magic:#010x}, not 0x000008..")
        rank = magic & 255
        sizes = struct.unpack_from(f">{rank}I", content, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(sizes)
    except _ERRORS as error:
        raise _refusal(path, error) from error


def _idx_names(split: str) -> tuple[str, str]:
    return f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"


_LAYOUTS = {
    "cifar10": _Layout(
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        ("test_batch",),
        partial(_cifar, labels="labels"),
    ),
    "cifar100": _Layout(
        "cifar-100-python", ("train",), ("test",), partial(_cifar, labels="fine_labels")
    ),
    "mnist": _Layout("MNIST/raw", _idx_names("train"), _idx_names("t10k"), _idx),
    "fashion_mnist": _Layout(
        "FashionMNIST/raw", _idx_names("train"), _idx_names("t10k"), _idx
    ),
}
