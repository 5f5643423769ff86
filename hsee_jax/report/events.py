"""Runs as event files for TensorBoard."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from hsee_jax.core.errors import UserError
from hsee_jax.core.files import writing
from hsee_jax.report.curves import Curve
from hsee_jax.tracking.event_files import EventWriter, check_library


def write_events(curves: Sequence[Curve], folder: Path) -> None:
    """Write the scalars of each run for TensorBoard.

    Args:
      curves: see `read_curves`.
      folder: a new or empty folder; each run gets a folder with its name there.

    Raises:
      UserError: tensorboardX is not installed, or the folder is not empty or cannot be
        written to.
    """
    check_library()
    with writing(folder, "tensorboard"):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"tensorboard: {folder} is not empty")
        for run in (run for curve in curves for run in curve.runs):
            with closing(EventWriter(folder / run.name)) as writer:
                for record in run.records:
                    writer.add_round(record)
