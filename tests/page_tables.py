"""The tables of a page of the documentation, to compare with what tests try."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def read_table(page, heading):
    """Return the rows of the first table below a heading, by the names of columns."""
    text = (DOCS / page).read_text(encoding="utf-8")
    section = re.split(rf"^#+ {re.escape(heading)}\n", text, flags=re.M)[1]
    lines = [line for line in section.partition("\n#")[0].splitlines() if "|" in line]
    names, _, *rows = [cells(line) for line in lines]
    return [dict(zip(names, row, strict=True)) for row in rows]


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
