"""Tables of text, and their Markdown."""

from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """Text in rows and columns."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[Sequence[str]]


def markdown(table: Table) -> str:
    """Return a table as Markdown, without its title."""
    lines = (table.header, ("---",) * len(table.header), *table.rows)
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)
