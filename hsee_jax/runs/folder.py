"""A run's folder: whether a run may start or go on there, its lock, and its files."""

import contextlib
import itertools
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hsee_jax.config.schema import BOOKKEEPING, Config
from hsee_jax.config.values import flatten, from_dict
from hsee_jax.core.errors import DAMAGE, UserError
from hsee_jax.core.files import writing
from hsee_jax.core.options import text_of
from hsee_jax.data.info import DatasetInfo
from hsee_jax.parallel.processes import in_first
from hsee_jax.runs.equipment import FILE

_log = logging.getLogger(__name__)
_MAY_CHANGE = ("rounds", *BOOKKEEPING)  # with --resume


def read_config(folder: Path) -> Config:
    """Read the configuration of a run.

    Raises:
      UserError: there is no run in the folder, or its configuration is not valid.
    """
    return from_dict(read_values(folder))


def read_values(folder: Path) -> dict[str, Any]:
    """Read the values of a run's configuration; unlike `read_config` import nothing.

    Raises:
      UserError: there is no run in the folder, or the file holds no object of JSON.
    """
    path = folder / "config.json"
    if not os.path.isfile(path):  # false as well where it may not be looked at
        raise UserError(
            f"run: {folder} is not a run; allowed is a folder that `hsee train` wrote"
        )
    return _values(path)


def load_config(path: Path) -> Config:
    """Read a configuration file, with a byte order mark or without.

    Raises:
      UserError: the file is not there, not JSON, or not a valid configuration.
    """
    return from_dict(_values(path))


def _values(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"config: {path} cannot be read: {error.strerror}") from error
    except DAMAGE as error:
        raise UserError(f"config: {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"config: {path} is not an object of sections")
    return values


def read_info(folder: Path) -> DatasetInfo:
    """Read what a run's network knows of its data, which may be gone by now.

    Raises:
      UserError: the run's ``data.json`` is not there, or damaged.
    """
    path = folder / "data.json"
    try:
        return checked_info(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, *DAMAGE) as error:
        raise UserError(
            f"run: {path} is missing or damaged; `hsee train --resume --out {folder}` "
            "writes it anew"
        ) from error


def checked_info(values: Mapping[str, Any]) -> DatasetInfo:
    """Read the content of ``data.json``; raise TypeError or ValueError if damaged."""
    stored = DatasetInfo(**values)
    shape, classes = tuple(map(int, stored.input_shape)), int(stored.num_classes)
    mean, std = (tuple(map(float, figures)) for figures in (stored.mean, stored.std))
    if not shape or not len(mean) == len(std) == shape[-1]:
        raise ValueError("it lacks a mean or a deviation for each channel")
    if classes < 1 or not all(0 < value < math.inf for value in std):
        raise ValueError("it has no class, or a deviation that is no positive number")
    labels = stored.label_values
    if labels is not None:
        if not labels or len(labels) != classes:
            raise ValueError("it lacks a label for each class")
        text = isinstance(labels[0], str)
        labels = tuple(map(str, labels)) if text else tuple(map(int, labels))
    if stored.dtype not in ("uint8", "float32"):
        raise ValueError(f"it has samples of {stored.dtype}")
    digest = None if stored.digest is None else str(stored.digest)
    return DatasetInfo(shape, classes, mean, std, labels, stored.dtype, digest)


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written to, or made.

    Raises:
      UserError: the folder cannot be written to, or made.
    """
    places = (folder, *folder.absolute().parents)
    nearest = next(place for place in places if os.path.exists(place))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"out: {nearest} is not a folder that can be written to")


def check_name(folder: Path) -> None:
    """Refuse a folder whose name is no text: checkpoints cannot be kept there.

    Raises:
      UserError: the name has bytes outside of the encoding of the locale.
    """
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"run: {folder} has a name outside of the encoding of this locale; allowed "
            "is an ASCII name, or a name in UTF-8 in a UTF-8 locale"
        ) from error


def check_start(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder in which a run may not start, or go on.

    Raises:
      UserError: the folder does not allow it, or both flags are set.
    """
    check_name(folder)
    if resume and overwrite:
        raise UserError("resume: is not allowed together with overwrite")
    if resume:
        read_config(folder)
        return
    check_writable(folder)
    with writing(folder):
        found = list(folder.iterdir()) if os.path.exists(folder) else []
    names = {path.name for path in found if path.suffix != ".tmp"}
    if names <= {".lock"} or names == {".lock", FILE}:
        return  # nothing, or what is left of a run killed at its start
    try:
        read_config(folder)
    except UserError as error:
        raise UserError(
            f"out: {folder} is neither empty nor a run; allowed is a new folder"
        ) from error
    if not overwrite:
        raise UserError(
            f"out: {folder} holds a run already; allowed is a new folder, or --resume "
            "to go on with it, or --overwrite to replace it"
        )


def check_same(config: Config, stored: Config) -> None:
    """Refuse to go on with a run under another configuration.

    Raises:
      UserError: an option that has an effect differs.
    """
    ours, theirs = flatten(config), flatten(stored)
    for name in dict.fromkeys((*ours, *theirs)):
        if name not in _MAY_CHANGE and ours.get(name) != theirs.get(name):
            raise UserError(
                f"{name}: {text_of(ours.get(name))} is not allowed with --resume; the "
                f"run has {text_of(theirs.get(name))}"
            )


@contextlib.contextmanager
def new_folder(parent: Path, name: str) -> Iterator[Path]:
    """Make a folder that no other process has and yield it.

    The folder is called ``name``, or ``name-2`` and so on where that exists. If the
    body leaves it empty, because the run was refused, it is removed again.

    Raises:
      UserError: it cannot be made.
    """
    parent_is_new = not parent.exists()
    with writing(parent / name):
        parent.mkdir(parents=True, exist_ok=True)
        names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
        folder = next(parent / one for one in names if _made(parent / one))
    try:
        yield folder
    finally:
        for place in (folder, parent) if parent_is_new else (folder,):
            with contextlib.suppress(OSError):  # it is not empty
                place.rmdir()


def _made(folder: Path) -> bool:
    """Make a folder; return False if it exists."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the `sole_writer` of a folder, as the first of the processes of a run."""
    with contextlib.ExitStack() as stack:
        in_first(lambda: stack.enter_context(sole_writer(folder)))
        yield


@contextlib.contextmanager
def sole_writer(folder: Path, field: str = "out") -> Iterator[None]:
    """Make a folder and keep other processes out; the lock dies with this process.

    Args:
      folder: to make.
      field: the option that names it.

    Raises:
      UserError: another process writes there.
    """
    path = folder / ".lock"
    with contextlib.ExitStack() as stack:
        with writing(path, field):
            folder.mkdir(parents=True, exist_ok=True)
            path.touch()
        try:
            stack.enter_context(FileLock(path).acquire(timeout=0))
        except Timeout as error:
            raise UserError(
                f"{field}: {folder} is being written by another process; allowed is "
                "another folder, or to wait for its end"
            ) from error
        except (OSError, NotImplementedError):  # a file system without locks
            _log.warning("%s cannot be locked", folder)
        yield
