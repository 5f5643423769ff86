"""Read the file of ``--absences-file``."""

import csv
import re
from pathlib import Path

from hsee_jax.core.errors import UserError
from hsee_jax.core.rows import csv_rows

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
    rows = _rows(path)
    names = rows[0][1] if rows else []
    for name in _COLUMNS:
        if names.count(name) != 1:
            raise UserError(
                f"absences_file: {path} has {names.count(name)} columns {name} among "
                f"{', '.join(names) or 'none'}; allowed are {','.join(_COLUMNS)}, "
                "separated by commas, semicolons or tabs"
            )
    return tuple(
        _absence(
            dict(zip(names, texts, strict=False)),
            f"absences_file: {path}, line {number}",
            num_clients,
        )
        for number, texts in rows[1:]
    )


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """Read the rows of a CSV file that are not blank, with their line numbers."""
    try:
        return csv_rows(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"absences_file: {path} cannot be read: "
            f"{getattr(error, 'strerror', None) or error}; allowed is CSV in UTF-8 "
            f"with the columns {','.join(_COLUMNS)}"
        ) from error


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
