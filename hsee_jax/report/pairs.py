"""The output of ``hsee plan --pairs``: a table, and ``pairs.json``."""

from collections.abc import Sequence
from typing import Any

from hsee_jax.report.tables import Table
from hsee_jax.systems.pairing import Pair
from hsee_jax.systems.problem import Problem

_HEADER = (
    "device",
    "clients",
    "holds of its own",
    "hosted by",
    "hosts",
    "memory MB",
    "busy",
    "round s",
)


def pairs_document(
    problem: Problem, pairs: Sequence[Pair], layers: Sequence[str]
) -> dict[str, Any]:
    """Return pairs as values of JSON.

    Args:
      problem: the planner's problem.
      pairs: the pairs of all its clients.
      layers: the names of the network's layers.
    """
    return {
        "layers": list(layers),
        "seconds": max(pair.seconds for pair in pairs),
        "pairs": [
            {
                "seconds": pair.seconds,
                "clients": [
                    {
                        "id": client,
                        "device": problem.devices[client].name,
                        "cut": pair.cuts[n],
                        "busy_seconds": pair.busy_s[n],
                        "memory_bytes": pair.memory_bytes[n],
                    }
                    for n, client in enumerate(pair.clients)
                ],
            }
            for pair in pairs
        ],
    }


def pairs_table(document: dict[str, Any]) -> Table:
    """Make a table with a row for the clients of each device, partner and split.

    Args:
      document: see `pairs_document`.
    """
    last = len(document["layers"])
    kinds: dict[tuple[str, ...], list[tuple[dict[str, Any], float]]] = {}
    for pair in document["pairs"]:
        for own, other in (pair["clients"], pair["clients"][::-1]):
            kind = (
                own["device"],
                _layers(1, own["cut"]),
                _part(other["device"], own["cut"], last),
                _part(other["device"], other["cut"], last),
            )
            kinds.setdefault(kind, []).append((own, pair["seconds"]))
    rows = []
    for (device, holds, host, hosts), clients in sorted(kinds.items()):
        count = len(clients)
        busy = sum(own["busy_seconds"] / seconds for own, seconds in clients) / count
        rows.append(
            (
                device,
                str(count),
                holds,
                host,
                hosts,
                f"{clients[0][0]['memory_bytes'] / 1e6:,.1f}",
                f"{busy:.0%}",
                f"{sum(seconds for _, seconds in clients) / count:,.1f}",
            )
        )
    title = (
        f"pairs without a server: a round of {document['seconds']:,.1f} s, without the "
        "means of the weights"
    )
    return Table(title, _HEADER, rows)


def _part(device: str, cut: int, last: int) -> str:
    """Return a device and the layers behind a cut, or "none"."""
    return "none" if cut == last else f"{device}: {_layers(cut + 1, last)}"


def _layers(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}..{last}"
