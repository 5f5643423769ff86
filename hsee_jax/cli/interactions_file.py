"""Read the file of ``--interactions-file``."""

import json
from pathlib import Path

from hsee_jax.core.errors import DAMAGE, UserError


def read_interactions(path: Path) -> tuple[str, ...]:
    """Read `interactions` from a file that ``hsee interactions`` wrote.

    Returns:
      Entries of `interactions`, such as ``"0,3"``.

    Raises:
      UserError: the file cannot be read, is no such file, or holds no interaction.
    """
    try:
        chosen = json.loads(path.read_text(encoding="utf-8-sig"))["chosen"]
        found = [",".join(str(int(c)) for c in one["columns"]) for one in chosen]
    except (OSError, *DAMAGE) as error:
        reason = error.strerror if isinstance(error, OSError) else repr(error)
        raise _refusal(path, f"cannot be read: {reason}") from error
    if not found:
        raise _refusal(path, "holds no interaction")
    return tuple(found)


def _refusal(path: Path, what: str) -> UserError:
    return UserError(
        f"interactions_file: {path} {what}; allowed is interactions.json that `hsee "
        "interactions` wrote"
    )
