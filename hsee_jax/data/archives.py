"""Read the archives that the authors of the datasets publish.

The datasets are CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), the labelled images of
STL-10 (Coates et al., 2011), MNIST (LeCun et al., 1998) and Fashion-MNIST (Xiao et
al., arXiv:1708.07747). A file is read only if it has the MD5 checksum that its authors
publish; nothing is unpickled, and nothing is unpacked to disk.
"""

import functools
import gzip
import hashlib
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.core.types import Dataset
from hsee_jax.data.info import Source


class Archive(NamedTuple):
    """The published files of a dataset."""

    url: str  # the address of all files, without their names
    files: dict[str, str]  # name -> MD5 checksum, hexadecimal
    train: tuple[str, ...]  # the files in the archive that `parse` takes, in order
    test: tuple[str, ...]
    parse: Callable[..., Dataset]  # contents of these files -> images and labels
    folder: str = ""  # the folder of the files, below the folder of all datasets


def find(dataset: str, folder: Path) -> Source | None:
    """Find the files of an archive; return None if a file is missing."""
    archive = ARCHIVES.get(dataset)
    if archive is None:
        return None
    paths = [folder / archive.folder / name for name in archive.files]
    if not all(path.is_file() for path in paths):
        return None

    @functools.cache
    def contents() -> dict[str, bytes]:
        for path, md5 in zip(paths, archive.files.values(), strict=True):
            _check(path, md5)
        wanted = {*archive.train, *archive.test}
        return {k: v for path in paths for k, v in _unpack(path, wanted).items()}

    def read(split: str, limit: int | None) -> Dataset:
        names = archive.train if split == "train" else archive.test
        images, labels = archive.parse(*(contents()[name] for name in names))
        return Dataset(images[:limit], labels[:limit])

    what = paths[0] if len(paths) == 1 else f"{len(paths)} files in {paths[0].parent}"
    return Source(f"{what}, checksums as published", read)


def _check(path: Path, md5: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False))
    if digest.hexdigest() != md5:
        raise UserError(
            f"data_dir: {path} has the MD5 checksum {digest.hexdigest()}; allowed is "
            f"the published file, {md5}: remove this one and download it again"
        )


def _unpack(path: Path, wanted: set[str]) -> dict[str, bytes]:
    """Return the content of a ``.gz``, or of wanted files in a ``.tar.gz``, by name."""
    if not path.name.endswith(".tar.gz"):
        return {path.name: gzip.decompress(path.read_bytes())}
    found: dict[str, bytes] = {}
    with tarfile.open(path, "r|gz", bufsize=2**20) as tar:
        for member in tar:
            name = PurePosixPath(member.name).name
            if name in wanted and (file := tar.extractfile(member)):
                found[name] = file.read()
            if len(found) == len(wanted):
                break  # STL-10 ends in 100,000 images without labels
    return found


def _cifar(*contents: bytes, label_bytes: int) -> Dataset:
    """Parse records of labels, of which only the last counts, and 3 colour planes."""
    records = np.frombuffer(b"".join(contents), np.uint8)
    records = records.reshape(-1, label_bytes + 3 * 32 * 32)
    planes = records[:, label_bytes:].reshape(-1, 3, 32, 32)
    return Dataset(
        np.ascontiguousarray(planes.transpose(0, 2, 3, 1)),
        records[:, label_bytes - 1].astype(np.int32),
    )


def _stl10(images: bytes, labels: bytes) -> Dataset:
    """Parse images as 3 planes, column after column, and labels that start at 1."""
    columns = np.frombuffer(images, np.uint8).reshape(-1, 3, 96, 96)
    return Dataset(
        np.ascontiguousarray(columns.transpose(0, 3, 2, 1)),
        np.frombuffer(labels, np.uint8).astype(np.int32) - 1,
    )


def _idx(images: bytes, labels: bytes) -> Dataset:
    """Parse MNIST's idx format: a magic number, big-endian sizes, then the bytes."""
    sizes = np.frombuffer(images, ">u4", count=3, offset=4)
    return Dataset(
        np.frombuffer(images, np.uint8, offset=16).reshape(*sizes, 1),
        np.frombuffer(labels, np.uint8, offset=8).astype(np.int32),
    )


ARCHIVES = {
    "cifar10": Archive(
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test=("test_batch.bin",),
        parse=partial(_cifar, label_bytes=1),
    ),
    "cifar100": Archive(
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
        train=("train.bin",),
        test=("test.bin",),
        parse=partial(_cifar, label_bytes=2),  # the coarse label, then the fine one
    ),
    "stl10": Archive(
        "http://ai.stanford.edu/~acoates/stl10/",
        {"stl10_binary.tar.gz": "91f7769df0f17e558f3565bffb0c7dfb"},
        train=("train_X.bin", "train_y.bin"),
        test=("test_X.bin", "test_y.bin"),
        parse=_stl10,
    ),
    "mnist": Archive(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
        train=("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
        test=("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
        parse=_idx,
        folder="mnist",
    ),
    "fashion_mnist": Archive(
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/"
        "fashion/",
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
        train=("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
        test=("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
        parse=_idx,
        folder="fashion_mnist",
    ),
}
