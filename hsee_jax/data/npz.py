"""Datasets in the format of NumPy: ``train.npz`` and ``test.npz`` in a folder.

Each file holds samples as ``images`` or ``x``, and labels as ``labels`` or ``y``; see
`arrays` for their types and shapes. The folder holds the user's own dataset, or has the
name of a key of `KNOWN`.
"""

import os
import zipfile
import zlib
from pathlib import Path

import numpy as np

from hsee_jax.core.errors import UserError
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
        *(_load(folder / f"{s}.npz") for s in ("train", "test")), labels=labels
    )
    return data._replace(
        notes=(f"from train.npz and test.npz in {folder}", *data.notes)
    )


def find(dataset: str, folder: Path) -> Source | None:
    """Find both files of a dataset in `KNOWN`; return None if one is missing."""
    place = folder / dataset
    if not is_there(place):
        return None

    def read_split(split: str, limit: int | None) -> Dataset:
        images, labels = as_known(_load(place / f"{split}.npz"), KNOWN[dataset])
        return Dataset(images[:limit], labels[:limit])

    return Source(f"train.npz and test.npz in {place}", read_split)


def write_npz(folder: str | os.PathLike[str], data: Arrays) -> None:
    """Write arrays as the files that ``--dataset npz`` reads.

    Args:
      folder: to write ``train.npz`` and ``test.npz`` to; it is made if it is missing.
      data: ``(x, y, x_test, y_test)``, see `arrays` for their types and shapes.

    Raises:
      UserError: the arrays are not valid.
    """
    place = Path(folder)
    splits = raw_of(data, "the arrays", "data")
    convert(*splits, labels="remap")
    place.mkdir(parents=True, exist_ok=True)
    for name, split in zip(("train", "test"), splits, strict=True):
        samples, labels = np.asarray(split.samples), np.asarray(split.labels)
        if labels.dtype.kind == "O":  # text of another library
            labels = labels.astype(np.str_)
        np.savez(place / f"{name}.npz", x=samples, y=labels)


def _load(path: Path) -> Raw:
    """Read the arrays of a file; nothing is unpickled."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            for names in _NAMES:
                if all(name in arrays for name in names):
                    samples, labels = (arrays[name] for name in names)
                    return Raw(samples, labels, Place(str(path)))
            found = ", ".join(arrays) or "nothing"
    except (
        OSError,
        EOFError,
        TypeError,
        ValueError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(f"data_dir: {path} cannot be read: {error}; {_ALLOWED}") from (
            error
        )
    raise Place(str(path)).refusal(found, _ALLOWED)
