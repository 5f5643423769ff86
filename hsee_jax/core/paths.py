"""Paths as users write them."""

import os
from pathlib import Path

from hsee_jax.core.errors import UserError


def resolve(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path without links, as far as they lead somewhere.

    `Path.resolve` raises a RuntimeError for a loop of links on Python 3.11 and 3.12.
    """
    return Path(os.path.realpath(path))


def expand_home(path: str | os.PathLike[str], field: str) -> Path:
    """Replace a leading ``~`` or ``~user`` of a path by the folder of that user.

    Args:
      path: as the user wrote it.
      field: the option that gives the path, for the error.

    Raises:
      UserError: there is no such user, or the path is empty.
    """
    if not os.fspath(path):
        raise UserError(f"{field}: an empty path is not allowed")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{field}: {path} names a user without a home; allowed is the path of a "
            "folder"
        ) from error
