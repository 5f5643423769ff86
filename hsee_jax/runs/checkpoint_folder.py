"""The folders of checkpoints: their names, their digests and their removal."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from hsee_jax.core.errors import DAMAGE, UserError

DIGESTS, NOTES = "digests.json", "notes.json"
UNFINISHED = ".tmp"  # suffix of the name of an unfinished checkpoint


_NAME = r"(\d+)(?:-(\d+))?"  # rounds, and steps of the next round


def find_places(folder: Path) -> dict[tuple[int, int], Path]:
    """Find the checkpoints in a folder, by the rounds and steps in their names."""
    names = {path: re.fullmatch(_NAME, path.name) for path in _in(folder)}
    return {
        (int(name[1]), int(name[2] or 0)): path for path, name in names.items() if name
    }


def find_unfinished(folder: Path) -> list[Path]:
    """Find the checkpoints in a folder that were not finished, or half removed."""
    name = rf"{_NAME}(\.old)?{re.escape(UNFINISHED)}"
    return [path for path in _in(folder) if re.fullmatch(name, path.name)]


def _in(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"run: {folder} cannot be read: {error.strerror}") from error


def read_score(folder: Path) -> float:
    """Read the score of a checkpoint; return minus infinity if it is damaged."""
    try:
        return float(json.loads((folder / NOTES).read_text(encoding="utf-8"))["score"])
    except (OSError, *DAMAGE):
        return float("-inf")


def remove(folder: Path) -> None:
    """Remove a checkpoint; rename it first, so that nobody sees half of its files."""
    if folder.exists():
        old = folder.with_name(f"{folder.name}.old{UNFINISHED}")
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(folder.replace(old))


def verify(folder: Path) -> None:
    """Compare the files of a checkpoint with their digests.

    Raises:
      UserError: a file is missing or has changed.
    """
    try:
        known = dict(json.loads((folder / DIGESTS).read_text(encoding="utf-8")))
        found = compute_digests(folder)
    except (OSError, *DAMAGE) as error:
        raise _damaged(folder, DIGESTS) from error
    for name in sorted({*known, *found}):
        if known.get(name) != found.get(name):
            raise _damaged(folder, name)


def _damaged(folder: Path, name: str) -> UserError:
    path = folder / name
    what = "is missing or may not be read"
    if os.path.exists(path):
        what = "has changed since it was written"
    return UserError(f"run: checkpoint {folder} cannot be read: {path} {what}")


def compute_digests(folder: Path) -> dict[str, str]:
    """Compute the sha256 of every file below a folder, by its path."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != DIGESTS:
            with path.open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
