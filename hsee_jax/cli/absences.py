"""Read the file of ``--absences-file``."""

import re
from pathlib import Path

from hsee_jax.core.errors import UserError
from hsee_jax.core.rows import read_table

_COLUMNS = ("client", "from", "to")  # of an absences file


def read_absences(path: Path, num_clients: int) -> tuple[str, ...]:
    """Read `absences` from a CSV file with the columns client, from and to.

    Columns are separated by commas, semicolons or tabs. A byte order mark, blank lines,
    other columns, and spaces around names and values are ignored.

    Args:
      path: the file.
      num_clients: the number of clients.

    Returns:
      Entries of `absences`, ``CLIENT:FROM-TO``.

    Raises:
      UserError: the file cannot be read, lacks a column, or holds a value that is not
        allowed.
    """
    return tuple(
        _absence(values, f"absences_file: {path}, line {number}", num_clients)
        for number, values in read_table(path, _COLUMNS, "absences_file")
    )


def _absence(values: dict[str, str], where: str, num_clients: int) -> str:
    """Return a row as an entry of `absences`; begin errors with ``where``."""
    for name in _COLUMNS:
        if not re.fullmatch(r"\d{1,9}", values.get(name, "")):
            raise UserError(
                f"{where}: {name} {values.get(name, '')!r} is not allowed; allowed is "
                "a whole number of at most 9 digits"
            )
    client, first, last = (int(values[name]) for name in _COLUMNS)
    if client >= num_clients:
        raise UserError(
            f"{where}: client {client} is not allowed; allowed are 0..{num_clients - 1}"
        )
    if not 1 <= first <= last:
        raise UserError(
            f"{where}: from {first} to {last} is not allowed; allowed are rounds from "
            "1, in ascending order"
        )
    return f"{client}:{first}-{last}"
