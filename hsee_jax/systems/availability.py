"""When clients are available: a trace of periods, in simulated seconds.

A trace is a CSV file with a row for each period::

    client,from_s,to_s
    3,0,3600
    3,7200,86400

A client that the trace does not name is always available.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hsee_jax.core.errors import UserError
from hsee_jax.core.rows import read_table


class Period(NamedTuple):
    """A period in which a client is available."""

    client: int
    from_s: float  # since the start of the run
    to_s: float  # not included


def read_availability(path: str | Path, num_clients: int) -> tuple[Period, ...]:
    """Read a trace.

    Columns are separated by commas, semicolons or tabs; other columns are ignored.

    Args:
      path: the file.
      num_clients: the number of clients.

    Raises:
      UserError: the file cannot be read, lacks a column or a row, or holds a value that
        is not allowed.
    """
    names = Period._fields
    rows = read_table(Path(path), names, "availability")
    if not rows:
        raise UserError(f"availability: {path} has no period; allowed is 1 or more")
    periods = []
    for line, values in rows:
        try:
            period = _period([values.get(name, "") for name in names])
            check_period(period, num_clients)
        except UserError as error:
            where = f"availability: {path}, line {line}"
            raise UserError(f"{where}: {error}") from error
        periods.append(period)
    return tuple(periods)


def check_period(period: Period, num_clients: int) -> None:
    """Refuse a period of an unknown client, or one that is empty.

    Raises:
      UserError: the period is not allowed.
    """
    client, from_s, to_s = period
    if not 0 <= client < num_clients:
        raise UserError(
            f"client {client} is not allowed; allowed are 0..{num_clients - 1}"
        )
    if not 0 <= from_s < to_s < math.inf:
        raise UserError(
            f"from_s {from_s:g} to_s {to_s:g} is not allowed; allowed are seconds from "
            "0, in ascending order"
        )


def _period(cells: Sequence[str]) -> Period:
    try:
        return Period(int(cells[0]), float(cells[1]), float(cells[2]))
    except ValueError as error:
        raise UserError(
            f"{','.join(cells)} is not allowed; allowed are a client's id and two "
            "numbers of seconds"
        ) from error


Availability = Mapping[int, Sequence[Period]]  # of the clients that a trace names


def by_client(periods: Iterable[Period]) -> Availability:
    """Group the periods of a trace by client."""
    found: dict[int, list[Period]] = {}
    for period in periods:
        found.setdefault(period.client, []).append(period)
    return found


def available_from(availability: Availability, client: int, second: float) -> float:
    """Return the first second, not before ``second``, at which a client is available.

    The result is infinite if there is no such second.
    """
    if client not in availability:
        return second
    ahead = (p for p in availability[client] if p.to_s > second)
    return min((max(second, p.from_s) for p in ahead), default=math.inf)
