"""The output of ``hsee plan``: tables, ``plan.json`` and a picture of the round."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hsee_jax.core.files import replace_file, writing
from hsee_jax.report.gantt import draw_round
from hsee_jax.report.tables import Table
from hsee_jax.systems.comparison import Row
from hsee_jax.systems.outcome import Plan
from hsee_jax.systems.problem import Problem

Document = dict[str, Any]
_PREDICTED = {"predicted_exit_accuracy": "exit accuracy"}
_MEANS = ("mean_exit_accuracy", "mean_server_accuracy")


def document(problem: Problem, plan: Plan, layers: Sequence[str]) -> Document:
    """Return a plan as values of JSON.

    Args:
      problem: the planner's problem.
      plan: the planner's answer.
      layers: the names of the network's layers.
    """
    time, binds = plan.time, plan.time.binds
    columns = {
        "memory_bytes": plan.memory_bytes,
        "busy_share": time.busy_s / time.seconds,
        "joules": plan.joules,
        "up_bytes": time.up_bytes,
        "down_bytes": time.down_bytes,
    }
    if problem.exit_accuracy is not None:
        columns["predicted_exit_accuracy"] = problem.exit_accuracy[plan.cuts - 1]
    clients = [
        {"id": i, "device": device.name, "cut": int(plan.cuts[i])}
        | {name: _number(values[i]) for name, values in columns.items()}
        | {"binds": binds[i]}
        for i, device in enumerate(problem.devices)
    ]
    return {
        "layers": list(layers),
        "seconds": time.seconds,
        "bound_seconds": plan.bound_s,
        "joules": _number(plan.joules.sum()),
        "up_bytes": float(time.up_bytes.sum()),
        "down_bytes": float(time.down_bytes.sum()),
        "server": {
            "device": problem.server.name,
            "memory_bytes": plan.server_bytes,
            "busy_share": time.server_share,
        },
        "clients": clients,
    }


def _number(value: Any) -> float | int | None:
    """Return a number of Python; None for NaN, which JSON does not have."""
    number = value.item()
    return None if np.isnan(number) else number


def by_kind(plan: Document) -> Table:
    """Make a table with a row for the clients of each device and cut.

    Args:
      plan: see `document`.
    """
    kinds: dict[tuple[str, int], list[Document]] = {}
    for client in plan["clients"]:
        kinds.setdefault((client["device"], client["cut"]), []).append(client)
    shown = [name for name in _PREDICTED if name in plan["clients"][0]]
    rows = []
    for (device, cut), clients in sorted(kinds.items()):
        binds = [client["binds"] for client in clients]
        rows.append(
            (
                device,
                str(len(clients)),
                f"{cut} {plan['layers'][cut - 1]}",
                f"{clients[0]['memory_bytes'] / 1e6:,.1f}",
                f"{_mean(clients, 'busy_share'):.0%}",
                _optional(_mean(clients, "joules"), "{:,.1f}"),
                f"{_mean(clients, 'up_bytes') / 1e6:,.2f}",
                f"{_mean(clients, 'down_bytes') / 1e6:,.2f}",
                max(dict.fromkeys(binds), key=binds.count),
                *(f"{clients[0][name]:.3f}" for name in shown),
            )
        )
    server = plan["server"]
    title = (
        f"a round of {plan['seconds']:,.1f} s, "
        f"{_optional(plan['joules'], '{:,.0f}')} J, "
        f"{plan['up_bytes'] / 1e6:,.1f} MB up, "
        f"{plan['down_bytes'] / 1e6:,.1f} MB down; "
        f"{server['device']} busy {server['busy_share']:.0%}, "
        f"{server['memory_bytes'] / 1e6:,.0f} MB; a row is the mean of its clients"
    )
    if "predicted" in plan:
        exits, servers = (plan["predicted"][name] for name in _MEANS)
        title += f"; predicted mean accuracy: exits {exits:.3f}, servers {servers:.3f}"
    header = (
        "device",
        "clients",
        "cut",
        "memory MB",
        "busy",
        "joules",
        "MB up",
        "MB down",
        "what binds",
        *(_PREDICTED[name] for name in shown),
    )
    return Table(title, header, rows)


def _mean(clients: Sequence[Document], name: str) -> float:
    values = [client[name] for client in clients]
    return float("nan") if None in values else float(np.mean(values))


def _optional(value: float | None, form: str) -> str:
    return "unknown" if value is None or np.isnan(value) else form.format(value)


def side_by_side(title: str, what: str, rows: Sequence[Row]) -> Table:
    """Make a table with a row for each plan.

    Args:
      title: the table's title.
      what: the heading of the column of names.
      rows: the plans.
    """
    header = (what, "cuts", "seconds", "joules", "MB up", "MB down", "server busy")
    return Table(title, header, [(row.name, *_cells(row)) for row in rows])


def _cells(row: Row) -> tuple[str, ...]:
    if row.plan is None:
        return ("not possible", *[""] * 5)
    cuts, time = row.plan.cuts, row.plan.time
    least, most = int(cuts.min()), int(cuts.max())
    return (
        str(least) if least == most else f"{least}..{most}",
        f"{time.seconds:,.1f}",
        _optional(float(row.plan.joules.sum()), "{:,.0f}"),
        f"{time.up_bytes.sum() / 1e6:,.1f}",
        f"{time.down_bytes.sum() / 1e6:,.1f}",
        f"{time.server_share:.0%}",
    )


def write(plan: Document, problem: Problem, answer: Plan, folder: Path) -> None:
    """Write ``plan.json`` and ``plan.png``, and replace those of an earlier plan.

    Args:
      plan: the document, perhaps with more entries.
      problem: the planner's problem.
      answer: the planner's answer.
      folder: the folder for the files; `write` makes it if it is missing.

    Raises:
      UserError: the folder cannot be written to.
    """
    picture = draw_round(problem, answer)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "plan.json", json.dumps(plan, indent=2) + "\n")
        replace_file(folder / "plan.png", picture)
