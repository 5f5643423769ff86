"""Event files for TensorBoard, written while a run trains or from finished runs.

`EventWriter` writes in the calling thread: an error is raised where it happens, and a
round is on the disk when `EventWriter.add_round` returns.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hsee_jax.core.errors import no_package
from hsee_jax.core.options import text_of
from hsee_jax.runs.experiment import Experiment
from hsee_jax.runs.records import RoundRecord, Summary
from hsee_jax.tracking.bookmark import Bookmark
from hsee_jax.tracking.registry import register
from hsee_jax.tracking.tracker import Tracker


def check_library() -> None:
    """Import the library that writes event files.

    Raises:
      UserError: it is not installed.
    """
    try:
        import tensorboardX  # noqa: F401
    except ImportError as error:
        raise no_package("tensorboard", "tensorboard") from error


class EventWriter:
    """Writes a new event file."""

    def __init__(self, folder: Path, *, rounds: int = 0) -> None:
        """Open the file.

        Args:
          folder: where the file is written; it is made if it is missing.
          rounds: number of finished rounds; TensorBoard drops all later rounds of older
            files in the folder.

        Raises:
          UserError: tensorboardX is not installed.
          OSError: the file cannot be written.
        """
        check_library()
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        # Names of files that are opened in the same second differ only in this suffix.
        self._file = EventsWriter(str(folder / "events"), f".{rounds}")
        start = SessionLog(status=SessionLog.START)
        self._write(step=rounds + 1, session_log=start)

    def add_round(self, record: RoundRecord) -> None:
        """Write the figures of a round."""
        from tensorboardX.proto.summary_pb2 import Summary as Values

        figures = record.scalars().items()
        values = [Values.Value(tag=tag, simple_value=figure) for tag, figure in figures]
        self._write(step=record.round, summary=Values(value=values))

    def add_text(self, tag: str, markdown: str) -> None:
        """Write a text, for the tab Text."""
        from tensorboardX.summary import text

        self._write(step=0, summary=text(tag, markdown))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write_event(Event(wall_time=time.time(), **content))
        self._file.flush()


@register(summary="event files in RUN/tensorboard, for tensorboard --logdir RUN")
def tensorboard(folder: str | os.PathLike[str]) -> Tracker:
    """Write event files to RUN/tensorboard, for ``tensorboard --logdir RUN``."""
    check_library()
    return EventFiles(folder)


class EventFiles(Tracker):
    """Writes event files to the folder ``tensorboard`` of a run."""

    name = "tensorboard"
    _writer: EventWriter | None = None

    def open(self, experiment: Experiment, bookmark: Bookmark, rounds: int) -> Bookmark:
        """Begin a file that replaces the rounds after the finished rounds."""
        self._writer = EventWriter(self.folder / "tensorboard", rounds=rounds)
        self._writer.add_text("config", _table(experiment.options))
        return bookmark._replace(rounds=min(bookmark.rounds, rounds))

    def log(self, record: RoundRecord) -> None:
        """Write the figures of a round."""
        assert self._writer is not None
        self._writer.add_round(record)

    def finish(self, summary: Summary) -> None:
        """Write the summary as a text."""
        assert self._writer is not None
        text = json.dumps(summary.to_json(), indent=2)
        self._writer.add_text("summary", f"```json\n{text}\n```")

    def close(self, error: type[BaseException] | None) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


def _table(options: Mapping[str, Any]) -> str:
    """Return the options of a run as a table in Markdown."""
    rows = [f"| {name} | {text_of(value)} |" for name, value in options.items()]
    return "\n".join(["| option | value |", "|---|---|", *rows])
