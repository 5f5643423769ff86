"""How far a round had come: what a checkpoint in the middle of it notes."""

from typing import Any

import numpy as np
import numpy.typing as npt

from hsee_jax.core.types import ExitMetrics, Metrics
from hsee_jax.engine.plan import EMPTY, RoundPlan
from hsee_jax.engine.round import RoundProgress
from hsee_jax.runs.checkpoint import Checkpoint


def midway_notes(
    plan: RoundPlan, progress: RoundProgress, seconds: float, wall_seconds: float
) -> dict[str, Any]:
    """Return what a checkpoint in the middle of a round notes."""
    exit_sums, server_sums, link = progress.metrics
    return {
        "seconds": seconds,
        "wall_seconds": wall_seconds,
        "ids": plan.ids.tolist(),
        "metrics": [[s.tolist() for s in sums] for sums in (exit_sums, server_sums)],
        "link": np.asarray(link).tolist(),
    }


def progress_from(plan: RoundPlan, checkpoint: Checkpoint) -> RoundProgress:
    """Read how far a round had come, with each client's sums in the slot it has now."""
    notes: Any = checkpoint.notes
    seats = {i: n for n, i in enumerate(notes["ids"]) if i != EMPTY}
    nothing = [[0, 0], [0, 0]]

    def moved(sums: list[Any], empty: Any = 0.0) -> npt.NDArray[Any]:
        ids = plan.ids.tolist()
        return np.array([sums[seats[i]] if i in seats else empty for i in ids])

    # Version 0.1 did not count the bytes of each message.
    link = notes.get("link", [nothing] * len(notes["ids"]))
    sums: Any = [tuple(map(moved, sums)) for sums in notes["metrics"]]
    exit_sums, server_sums = (Metrics(*branch) for branch in sums)
    moved_link: Any = moved(link, nothing)
    metrics = ExitMetrics(exit_sums, server_sums, moved_link)
    return RoundProgress(checkpoint.steps, False, metrics)
