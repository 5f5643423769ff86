"""What a run's folder keeps of a tracker, so that a resumed run continues there."""

import json
from pathlib import Path
from typing import NamedTuple

from hsee_jax.core.errors import DAMAGE
from hsee_jax.core.files import replace_file


class Bookmark(NamedTuple):
    """The place that a tracker has reached."""

    run_id: str = ""  # the id that the tracker gave to the run
    rounds: int = 0  # number of rounds that the tracker holds, counted from the first
    planned: int = 0  # rounds of the whole run; 0 in a file of before they were kept


def read_bookmark(path: Path) -> Bookmark:
    """Read a bookmark; return an empty one if the file is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        planned = int(values.get("planned", 0))
        return Bookmark(str(values["run_id"]), int(values["rounds"]), planned)
    except (OSError, *DAMAGE):
        return Bookmark()


def write_bookmark(path: Path, bookmark: Bookmark) -> None:
    """Write a bookmark completely or not at all.

    Raises:
      UserError: the file cannot be written.
    """
    path.parent.mkdir(exist_ok=True)
    replace_file(path, json.dumps(bookmark._asdict()) + "\n")
