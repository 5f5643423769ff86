"""Datasets in the format of NumPy: ``train.npz`` and ``test.npz`` in a folder.

Each file holds samples as ``images`` or ``x``, and labels as ``labels`` or ``y``; see
`arrays` for their types and shapes. The folder holds the user's own dataset, or has the
name of a dataset in `KNOWN`.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from hsee_jax.core.errors import UserError, one_line
from hsee_jax.core.files import writing
from hsee_jax.core.types import Dataset
from hsee_jax.data.arrays import Arrays, Raw, as_known, convert, raw_of
from hsee_jax.data.info import KNOWN, Data, Source
from hsee_jax.data.labels import Place

_NAMES = (("images", "labels"), ("x", "y"))
_ALLOWED = "allowed are the arrays `x` and `y`, or `images` and `labels`"


def is_there(folder: Path) -> bool:
    """Return whether a folder holds both files."""
    return all((folder / f"{split}.npz").is_file() for split in ("train", "test"))


def read(folder: Path, *, labels: str) -> Data:
    """Read the user's own dataset.

    Args:
      folder: the folder of the files.
      labels: see `convert`.

    Raises:
      UserError: a file is not there, or not valid.
    """
    if not is_there(folder):
        raise UserError(
            f"data_dir: {folder} is not allowed for npz; allowed is a folder with "
            "train.npz and test.npz, each with the arrays `x` and `y`"
        )
    data = convert(
        *(read_split(folder / f"{s}.npz") for s in ("train", "test")), labels=labels
    )
    return data._replace(
        notes=(f"from train.npz and test.npz in {folder}", *data.notes)
    )


def find(dataset: str, folder: Path) -> Source | None:
    """Find both files of a dataset in `KNOWN`; return None if one is missing."""
    place = folder / dataset
    if not is_there(place):
        return None

    def take(split: str, limit: int | None) -> Dataset:
        images, labels = as_known(read_split(place / f"{split}.npz"), KNOWN[dataset])
        return Dataset(images[:limit], labels[:limit])

    return Source(f"train.npz and test.npz in {place}", take)


def write_npz(folder: str | os.PathLike[str], data: Arrays) -> None:
    """Write arrays as the files that ``--dataset npz`` reads, both or none.

    Args:
      folder: to write ``train.npz`` and ``test.npz`` to; it is made if it is missing.
      data: ``(x, y, x_test, y_test)``, see `arrays` for their types and shapes.

    Raises:
      UserError: the arrays are not valid, or the files cannot be written.
    """
    splits = raw_of(data, "the arrays", "data")
    convert(*splits, labels="remap")
    paths = [Path(folder) / f"{name}.npz" for name in ("train", "test")]
    parts = [path.with_name(f"{path.name}.tmp") for path in paths]
    allowed = "allowed is a folder for train.npz and test.npz"
    try:
        with writing(Path(folder), "folder", hint=allowed):
            paths[0].parent.mkdir(parents=True, exist_ok=True)
            for path in paths:
                if path.is_dir():
                    raise IsADirectoryError(f"{path.name} is a folder")
            for part, split in zip(parts, splits, strict=True):
                _write_split(part, split)
            for part, path in zip(parts, paths, strict=True):
                part.replace(path)
    finally:
        for part in parts:
            with contextlib.suppress(OSError):
                part.unlink()


def write_shard(path: Path, data: Dataset) -> None:
    """Write the samples of one client as a file that `read_split` reads.

    Raises:
      UserError: it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_split(path, Raw(data.images, data.labels, Place(str(path))))


def _write_split(path: Path, split: Raw) -> None:
    samples, labels = np.asarray(split.samples), np.asarray(split.labels)
    if labels.dtype.kind == "O":  # text of another library
        labels = labels.astype(np.str_)
    with path.open("wb") as file:
        np.savez(file, x=samples, y=labels)


def read_split(path: Path, field: str = "data_dir") -> Raw:
    """Read the samples and labels of a file; unpickle nothing.

    Args:
      path: of the file.
      field: the option that names it.

    Raises:
      UserError: the file cannot be read, or lacks samples or labels.
    """
    try:
        with path.open("rb") as file:
            if file.read(2) not in (b"PK", b"\x93N"):  # an archive, or a .npy file
                raise ValueError("it is not an npz file")
            file.seek(0)
            return _pair(np.load(file, allow_pickle=False), Place(str(path), field))
    except UserError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{field}: {path} cannot be read: {reason}; {_ALLOWED}") from (
            error
        )
    except Exception as error:  # readers of archives raise many types
        reason = one_line(error)
        raise UserError(f"{field}: {path} cannot be read: {reason}; {_ALLOWED}") from (
            error
        )


def _pair(content: Any, place: Place) -> Raw:
    """Take samples and labels from what NumPy found in a file.

    Raises:
      UserError: they are missing, or no arrays of several values.
    """
    if isinstance(content, np.ndarray):
        raise ValueError("it holds one array without a name, as a .npy file does")
    with content as arrays:
        for names in _NAMES:
            if all(name in arrays for name in names):
                samples, labels = (arrays[name] for name in names)
                if samples.ndim == 0 or labels.ndim == 0:
                    raise place.refusal("a single value", _ALLOWED)
                return Raw(samples, labels, place)
        raise place.refusal(", ".join(arrays) or "nothing", _ALLOWED)
