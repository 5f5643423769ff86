"""Clusters in the output of ``hsee plan``: which device holds which layers."""

from typing import Any

from hsee_jax.report.tables import Table
from hsee_jax.systems.outcome import Plan
from hsee_jax.systems.problem import Problem


def cluster_entries(problem: Problem, plan: Plan) -> list[dict[str, Any]]:
    """Return the clusters of a plan as values of JSON.

    Args:
      problem: the planner's problem.
      plan: the planner's answer.
    """
    entries = []
    for client, pipelines in problem.clusters.items():
        pipeline = pipelines.by_cut[int(plan.cuts[client]) - 1]
        assert pipeline is not None  # the planner takes no other cut
        starts = (0, *pipeline.ends)
        entries.append(
            {
                "client": client,
                "name": problem.devices[client].name,
                "micro_batches": pipeline.micro_batches,
                "seconds": pipeline.seconds,
                "devices": [
                    {"device": device.name, "layers": list(range(a + 1, b + 1))}
                    for device, a, b in zip(
                        pipelines.devices, starts, pipeline.ends, strict=False
                    )
                ],
            }
        )
    return entries


def clusters_table(entries: list[dict[str, Any]]) -> Table:
    """Make a table with a row for each device of each cluster.

    Args:
      entries: see `cluster_entries`.
    """
    header = ("cluster", "client", "micro-batches", "batch s", "device", "layers")
    rows = [
        (
            entry["name"],
            str(entry["client"]),
            str(entry["micro_batches"]),
            f"{entry['seconds']:,.3f}",
            device["device"],
            _span(device["layers"]),
        )
        for entry in entries
        for device in entry["devices"]
    ]
    return Table("clusters: devices that form one client", header, rows)


def _span(layers: list[int]) -> str:
    if not layers:
        return "none"
    return f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}..{layers[-1]}"
