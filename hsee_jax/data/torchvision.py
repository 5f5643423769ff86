"""Read known datasets as torchvision unpacks them, below the folder of all datasets.

CIFAR lies there as pickles, in ``cifar-10-batches-py`` and ``cifar-100-python``; MNIST
and Fashion-MNIST as idx files, in ``MNIST/raw`` and ``FashionMNIST/raw``, packed by
gzip or not. The unpickler admits nothing but arrays of NumPy and Python's own values,
so that a file cannot run code.
"""

import gzip
import pickle
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Dataset
from hsee_jax.data.info import Source

_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    MemoryError,
    struct.error,
    zlib.error,
    pickle.UnpicklingError,
)


class _Layout(NamedTuple):
    """The files of a dataset."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    parse: Callable[[list[Path]], Dataset]


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
        images, labels = layout.parse(paths)
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
    line = " ".join(str(reason).split())
    return UserError(
        f"data_dir: {path} cannot be read ({line}); allowed is the file as torchvision "
        "unpacks it"
    )


class _Unpickler(pickle.Unpickler):
    """Finds only what pickled arrays and byte strings need."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an admitted class or function; refuse any other."""
        module = module.replace("numpy._core", "numpy.core")
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ADMITTED[module, name]


def _encode(text: str, encoding: str) -> bytes:
    """Stand in for ``codecs.encode``, which writes the bytes of Python 3."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}")
    return text.encode("latin1")


# Arrays name these two functions of NumPy where they are pickled.
_array = np.zeros(0, np.uint8)
_reconstruct, _from_buffer = (
    cast(tuple[Any, ...], reduced)[0]
    for reduced in (_array.__reduce__(), _array.__reduce_ex__(5))
)
_ADMITTED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
}


def _cifar(paths: list[Path], *, labels: str) -> Dataset:
    """Parse pickled dictionaries of rows, 3 colour planes of 32x32, and labels."""
    images, numbers = [], []
    for path in paths:
        try:
            with path.open("rb") as file:
                batch = _Unpickler(file, encoding="bytes").load()
            batch = {_text(key): value for key, value in batch.items()}
            planes = np.asarray(batch["data"]).reshape(-1, 3, 32, 32)
            own = np.asarray(batch[labels]).astype(np.int32)
            if planes.dtype != np.uint8 or own.shape != planes.shape[:1]:
                raise ValueError(f"it holds {planes.dtype} {planes.shape} {own.shape}")
        except _ERRORS as error:
            raise _refusal(path, error) from error
        images.append(planes.transpose(0, 2, 3, 1))
        numbers.append(own)
    return Dataset(np.concatenate(images), np.concatenate(numbers))


def _text(key: str | bytes) -> str:
    return key.decode() if isinstance(key, bytes) else key


def _idx(paths: list[Path]) -> Dataset:
    """Parse the images and the labels of MNIST's idx format."""
    images, labels = (_idx_array(path) for path in paths)
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise _refusal(paths[0], f"{images.shape} images with {labels.shape} labels")
    return Dataset(images[..., None], labels.astype(np.int32))


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
