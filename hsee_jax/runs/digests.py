"""Digests of the files of a checkpoint, which show that none has changed."""

import hashlib
import json
from pathlib import Path

from hsee_jax.core.errors import UserError

DIGESTS = "digests.json"


def verify(folder: Path) -> None:
    """Compare the files of a checkpoint with their digests.

    Raises:
      UserError: one is missing, was added or has changed.
    """
    try:
        known = dict(json.loads((folder / DIGESTS).read_text()))
        found = digests_of(folder)
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(folder, DIGESTS) from error
    for name in sorted({*known, *found}):
        if known.get(name) != found.get(name):
            raise _damaged(folder, name)


def _damaged(folder: Path, name: str) -> UserError:
    path = folder / name
    what = "has changed since it was written" if path.exists() else "is missing"
    return UserError(f"run: checkpoint {folder} cannot be read: {path} {what}")


def digests_of(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below a folder, by its path."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != DIGESTS:
            with path.open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
