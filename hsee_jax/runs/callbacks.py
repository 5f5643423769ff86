"""What happens beside training: the loop calls callbacks, and knows none of them."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from hsee_jax.federation.state import RunState
from hsee_jax.parallel.processes import is_first
from hsee_jax.runs.checkpoint import Checkpoint, Writer
from hsee_jax.runs.experiment import Experiment
from hsee_jax.runs.folder import replace_file, writing
from hsee_jax.runs.records import RoundRecord, Summary, dumps


class Moment(NamedTuple):
    """Where a training is when it calls."""

    rounds: int  # finished
    steps: int  # finished in the round after them
    due: bool  # whether a checkpoint is to be written
    # Returns the state of all clients, as a checkpoint holds it. The next round gives
    # up its buffers: copy what you keep.
    state: Callable[[], RunState]
    notes: Mapping[str, Any]  # what `train` needs to go on from here


class Callback(AbstractContextManager["Callback"]):
    """Something that happens beside training; each method may be left out.

    The callback is entered before the first round and left after the last, or at an
    error. With several processes each has its own; see `is_first`.
    """

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave, whatever happened."""

    def on_start(self, experiment: Experiment) -> None:
        """Act before the first round."""

    def on_round(self, record: RoundRecord, moment: Moment) -> None:
        """Act after a round."""

    def on_pause(self, moment: Moment) -> None:
        """Act when the training stops in the middle of a round."""

    def on_end(self, summary: Summary) -> None:
        """Act after the last round, in the reverse order of the callbacks."""


class MetricsLog(Callback):
    """Writes ``metrics.jsonl``, and at the end ``summary.json``."""

    def __init__(self, folder: Path) -> None:
        """Choose the run's folder."""
        self._folder = folder

    def on_round(self, record: RoundRecord, moment: Moment) -> None:
        """Append a line."""
        if is_first():
            path = self._folder / "metrics.jsonl"
            with writing(path), path.open("a", encoding="utf-8") as file:
                file.write(dumps(record.to_json(), lines=True))

    def on_end(self, summary: Summary) -> None:
        """Write the summary."""
        if is_first():
            replace_file(self._folder / "summary.json", dumps(summary.to_json()))


class Checkpoints(Callback):
    """Writes checkpoints where they are due, and where a training stops."""

    def __init__(self, folder: Path, *, keep: int, after: Checkpoint | None) -> None:
        """Choose the run's folder; see `Writer`."""
        self._writer = Writer(folder / "checkpoints", keep=keep, after=after)

    def __enter__(self) -> "Checkpoints":
        """Open the folder."""
        self._writer.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for the last checkpoint."""
        self._writer.__exit__(kind, error, traceback)

    def on_round(self, record: RoundRecord, moment: Moment) -> None:
        """Write a checkpoint if one is due."""
        if moment.due:
            self._save(moment)

    def on_pause(self, moment: Moment) -> None:
        """Write a checkpoint in the middle of a round."""
        self._save(moment)

    def on_end(self, summary: Summary) -> None:
        """Wait for the last checkpoint: a run with a summary has it."""
        self._writer.seal()

    def _save(self, moment: Moment) -> None:
        self._writer.save(moment.rounds, moment.steps, moment.state(), moment.notes)
