"""Datasets as folders of PNG or JPEG files, one folder a class.

A folder holds ``train/CLASS/`` and ``test/CLASS/`` (or ``val``, ``valid``,
``validation``), or ``CLASS/`` alone; then a share of each class becomes the test set.
The files of a class may lie in folders of its own. Hidden files and files of other
types are passed over.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.data.arrays import Raw, convert
from hsee_jax.data.info import Data
from hsee_jax.data.labels import Place
from hsee_jax.data.pictures import Picture, decode
from hsee_jax.data.split import split_rows

TYPES = (".png", ".jpg", ".jpeg")
TEST_NAMES = ("test", "val", "valid", "validation")


class _File(NamedTuple):
    """A picture and the name of its class."""

    path: Path
    label: str


def is_there(folder: Path) -> bool:
    """Return whether a folder has folders in it."""
    return folder.is_dir() and any(_folders(folder))


def read(
    folder: Path, *, image_size: int | None, test_share: float | None, split_seed: int
) -> Data:
    """Read a dataset, with the names of its classes as `label_values`.

    Args:
      folder: see the module.
      image_size: see `decode`.
      test_share: the share of each class to set apart where there is no test set.
      split_seed: the seed of the order of the samples and of the test set.

    Raises:
      UserError: the folder is not like that, or a picture is not valid.
    """
    train_folder, test_folder = _split_folders(folder)
    train = _files(train_folder)
    test = [] if test_folder is None else _files(test_folder)
    train_rows, test_rows, note = split_rows(
        np.array([file.label for file in train]),
        len(test),
        test_share,
        seed=split_seed,
        place=str(test_folder),
    )
    files = [*train, *test]
    ordered = [files[row] for row in (*train_rows, *test_rows)]
    images, notes = decode([Picture(str(f.path), f.path) for f in ordered], image_size)
    labels = np.array([file.label for file in ordered])
    count = len(train_rows)
    data = convert(
        Raw(images[:count], labels[:count], Place(str(train_folder))),
        Raw(images[count:], labels[count:], Place(str(test_folder or folder))),
    )
    return data._replace(notes=(f"from {folder}", note, *notes, *data.notes))


def _split_folders(folder: Path) -> tuple[Path, Path | None]:
    """Return the folders of the training and of the test set, which may be missing."""
    if not is_there(folder):
        raise UserError(
            f"data_dir: {folder} is not allowed for imagefolder; allowed is a folder "
            "with train/CLASS/ and test/CLASS/, or CLASS/ alone, of PNG or JPEG files"
        )
    train = folder / "train"
    if not train.is_dir():
        return folder, None
    found = (folder / name for name in TEST_NAMES)
    return train, next((path for path in found if path.is_dir()), None)


def _folders(folder: Path) -> Sequence[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith((".", "__"))
    )


def _files(folder: Path) -> list[_File]:
    """Return the pictures of all classes, in sorted order."""
    files = []
    for place in _folders(folder):
        own = [
            _File(path, place.name)
            for path in sorted(place.rglob("*"))
            if path.suffix.lower() in TYPES and not path.name.startswith(".")
        ]
        if not own:
            raise UserError(
                f"data_dir: {place} holds no picture; allowed are folders of PNG or "
                "JPEG files, one for each class"
            )
        files += own
    if not files:
        raise UserError(
            f"data_dir: {folder} holds no folder; allowed are folders of PNG or JPEG "
            "files, one for each class"
        )
    return files
