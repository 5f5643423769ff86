"""Tables in CSV files, as people and spreadsheets write them."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from hsee_jax.core.errors import UserError

Row = tuple[int, dict[str, str]]  # the number of its line, and its cells by column


def read_table(path: Path, columns: Sequence[str], field: str) -> list[Row]:
    """Read the rows of a CSV file in UTF-8 that are not blank; see `csv_rows`.

    Args:
      path: of the file.
      columns: that its first row must have, each once; it may have others.
      field: the option that names the file.

    Raises:
      UserError: the file cannot be read, or lacks a column.
    """
    allowed = f"the columns {','.join(columns)}"
    try:
        rows = csv_rows(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{field}: {path} cannot be read: {reason}; allowed is CSV in UTF-8 with "
            f"{allowed}"
        ) from error
    header = rows[0][1] if rows else []
    for name in columns:
        if header.count(name) != 1:
            wrong = "repeats the column" if name in header else "lacks the column"
            found = ", ".join(header) or "none"
            raise UserError(
                f"{field}: {path} {wrong} {name}; it has {found}; "
                f"allowed are {allowed}, separated by commas, semicolons or tabs"
            )
    return [(n, dict(zip(header, cells, strict=False))) for n, cells in rows[1:]]


def csv_rows(text: str) -> list[tuple[int, list[str]]]:
    """Return the rows of CSV that are not blank, each with the number of its line.

    Columns are separated by commas, semicolons or tabs, whichever the first row has
    most of. Spaces around cells are dropped.

    Args:
      text: the content of a file.

    Raises:
      csv.Error: the text is not CSV.
    """
    lines = io.StringIO(text, newline="")  # a quoted cell may have several lines
    header = next(filter(str.strip, lines), "")
    mark = max(",;\t", key=header.count)
    lines.seek(0)
    reader = csv.reader(lines, delimiter=mark, skipinitialspace=True)
    rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    return [(number, cells) for number, cells in rows if any(cells)]
