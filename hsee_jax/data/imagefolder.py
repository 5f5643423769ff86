"""Datasets as folders of PNG or JPEG files, one folder per class.

A folder holds ``train/CLASS/`` and ``test/CLASS/``, or ``CLASS/`` alone; then a share
of each class becomes the test set. The splits may have the other names in `split`, in
capitals too. The folder of a class may have folders in it. `read` passes over files of
other types, and names that begin with ``.`` or ``__``.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hsee_jax.core.errors import UserError
from hsee_jax.data.arrays import Raw, convert
from hsee_jax.data.info import Data
from hsee_jax.data.labels import Place
from hsee_jax.data.pictures import Picture, decode
from hsee_jax.data.split import TEST_NAMES, TRAIN_NAMES, split_rows

TYPES = (".png", ".jpg", ".jpeg")
_HIDDEN = (".", "__")


class _File(NamedTuple):
    """A picture and the name of its class."""

    path: Path
    label: str


class _Splits(NamedTuple):
    """The folders of the splits."""

    train: Path
    test: Path | None  # None where a share of the training set becomes the test set
    unread: Sequence[str] = ()  # names of folders beside them


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
      UserError: the folder has another layout, a picture is not valid, or there is
        a test set and ``test_share`` was given too.
    """
    train_folder, test_folder, unread = _split_folders(folder)
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
    if unread:
        note += f" ({', '.join(unread)} not read)"
    return data._replace(notes=(f"from {folder}", note, *notes, *data.notes))


def _split_folders(folder: Path) -> _Splits:
    if not is_there(folder):
        raise UserError(
            f"data_dir: {folder} is not allowed for imagefolder; allowed is a folder "
            "with train/CLASS/ and test/CLASS/, or CLASS/ alone, of PNG or JPEG files"
        )
    found = _folders(folder)
    train, test = _named(found, TRAIN_NAMES), _named(found, TEST_NAMES)
    if not train and test:
        raise Place(str(folder)).refusal(
            f"{test[0].name}, but no train",
            "allowed are train/CLASS/ and test/CLASS/, or CLASS/ alone",
        )
    if len(train) > 1:
        raise Place(str(folder)).refusal(
            " and ".join(path.name for path in train), "allowed is one of them"
        )
    if not train:
        return _Splits(folder, None)
    read_here = (*train, *test[:1])
    unread = [path.name for path in found if path not in read_here]
    return _Splits(train[0], test[0] if test else None, unread)


def _named(folders: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """Return the folders with one of the names, in the order of the names."""
    return [path for name in names for path in folders if path.name.lower() == name]


def _folders(folder: Path) -> Sequence[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith(_HIDDEN)
    )


def _walk(folder: Path, around: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield the files in a folder and its folders, except hidden names.

    Args:
      folder: may be a link, as may the folders in it.
      around: the real paths of the folders around it; a link to one of them is empty.
    """
    here = folder.resolve()
    if here in around:
        return
    for path in folder.iterdir():
        if path.name.startswith(_HIDDEN):
            continue
        if path.is_dir():
            yield from _walk(path, (*around, here))
        else:
            yield path


def _files(folder: Path) -> list[_File]:
    """Return the pictures of all classes, in sorted order."""
    files = []
    for place in _folders(folder):
        own = [
            _File(path, place.name)
            for path in sorted(_walk(place, (folder.resolve(),)))
            if path.suffix.lower() in TYPES
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
