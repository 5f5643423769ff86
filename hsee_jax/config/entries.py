"""The entries of options that hold several values in one text."""

import re

from hsee_jax.core.errors import UserError


def parse_recut(text: str) -> tuple[int, tuple[str, ...]]:
    """Return round and cuts of an entry of `recuts`.

    Raises:
      UserError: the entry has another form.
    """
    found = re.fullmatch(r"(\d{1,9}):([^,:]+(?:,[^,:]+)*)", text)
    if found is None:
        raise UserError(
            f"recuts: {text} is not allowed; allowed is ROUND:CUT,CUT,... such as "
            "10:3,5"
        )
    return int(found[1]), tuple(found[2].split(","))


def parse_absence(text: str) -> tuple[int, int, int]:
    """Return client, first and last round of an entry of `absences`.

    Raises:
      UserError: the entry has another form.
    """
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})-(\d{1,9})", text)
    if found is None:
        raise not_an_absence(text)
    return int(found[1]), int(found[2]), int(found[3])


def not_an_absence(text: str) -> UserError:
    """Return the error that refuses an entry of `absences`."""
    return UserError(
        f"absences: {text} is not allowed; allowed is CLIENT:FROM-TO with a client's "
        "id and rounds from 1"
    )
