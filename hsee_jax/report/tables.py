"""Tables of text, their Markdown, and a note that stands below them."""

from collections.abc import Sequence
from typing import NamedTuple

# Below a table of accuracies, where `is_one_network` holds.
EQUAL_SERVERS = (
    "All servers score the same because they are one network: after the last average "
    "all clients and servers with a layer have the same weights for it. To average the "
    "servers alone, use --strategy averaging --average servers."
)


class Table(NamedTuple):
    """Text in rows and columns."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[Sequence[str]]


def markdown(table: Table) -> str:
    """Return a table as Markdown, without its title; a cell is one line."""
    lines = (table.header, ("---",) * len(table.header), *table.rows)
    escaped = (
        [" ".join(cell.splitlines()).replace("|", "\\|") for cell in line]
        for line in lines
    )
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)
