"""Rows of CSV files, as people and spreadsheets write them."""

import csv


def csv_rows(text: str) -> list[tuple[int, list[str]]]:
    """Return the rows of CSV that are not blank, each with the number of its line.

    Columns are separated by commas, semicolons or tabs, whichever the first row has
    most of. Spaces around cells are dropped.

    Args:
      text: the content of a file.

    Raises:
      csv.Error: the text is not CSV.
    """
    lines = text.splitlines()
    header = next(filter(str.strip, lines), "")
    mark = max(",;\t", key=header.count)
    reader = csv.reader(lines, delimiter=mark, skipinitialspace=True)
    rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    return [(number, cells) for number, cells in rows if any(cells)]
