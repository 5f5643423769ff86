"""Callbacks of the training loop: the log and the checkpoints are two of them."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from hsee_jax.core.errors import UserError
from hsee_jax.core.files import replace_file, sync_to_disk, writing
from hsee_jax.federation.recut import Shelf
from hsee_jax.federation.state import RunState
from hsee_jax.parallel.processes import in_first
from hsee_jax.runs.checkpoint import Checkpoint
from hsee_jax.runs.checkpoint_writer import Writer
from hsee_jax.runs.experiment import Experiment
from hsee_jax.runs.json_text import dumps
from hsee_jax.runs.records import RoundRecord, Summary

_RESUME = "after a checkpoint --resume goes on from it"


class Moment(NamedTuple):
    """The progress of a training at the call of a callback."""

    rounds: int  # finished rounds
    steps: int  # finished steps of the next round
    due: bool  # whether a checkpoint is due
    # Return the state of all clients, as a checkpoint holds it. The next round donates
    # its buffers, so copy the arrays that you keep.
    state: Callable[[], RunState]
    notes: Mapping[str, Any]  # the values that `train` needs to continue from here
    shelf: Shelf = {}  # the exits of cuts that clients have left, see `recut`


class Callback(AbstractContextManager["Callback"]):
    """Acts during a training; a subclass may define any of the methods.

    The loop enters the callback before the first round and exits it after the last
    round or at an error. Each of several processes has its own callbacks; see
    `is_first`.
    """

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Clean up, also after an error."""

    @staticmethod
    def check_all(callbacks: Iterable[object]) -> None:
        """Refuse objects that are not callbacks, such as a class of callbacks.

        Raises:
          UserError: there is such an entry.
        """
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise UserError(
                    f"callbacks: {callback!r} is not allowed; allowed are objects of "
                    "subclasses of hsee_jax.runs.Callback"
                )

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
        """Append a line to ``metrics.jsonl``."""
        in_first(partial(self._append, dumps(record.to_json(), lines=True)))

    def on_end(self, summary: Summary) -> None:
        """Write ``summary.json``."""
        path, text = self._folder / "summary.json", dumps(summary.to_json())
        in_first(lambda: replace_file(path, text, hint=_RESUME))

    def _append(self, line: str) -> None:
        path = self._folder / "metrics.jsonl"
        with writing(path, hint=_RESUME), path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            sync_to_disk(path)


class Checkpoints(Callback):
    """Writes checkpoints when they are due, and when a training stops."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        after: Checkpoint | None,
        at_once: bool = False,
    ) -> None:
        """Choose the run's folder; see `Writer`.

        Args:
          folder: of the run.
          keep: see `Writer`.
          after: see `Writer`.
          at_once: whether a checkpoint is complete before the next round.
        """
        self._at_once = at_once
        self._writer = Writer(folder / "checkpoints", keep=keep, after=after)

    def __enter__(self) -> "Checkpoints":
        """Open the folder of the checkpoints."""
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

    def seal_written(self) -> None:
        """Complete the last checkpoint once its arrays are written."""
        self._writer.seal_written()

    def on_pause(self, moment: Moment) -> None:
        """Write a checkpoint in the middle of a round."""
        self._save(moment)

    def on_end(self, summary: Summary) -> None:
        """Wait for the last checkpoint: a run with a summary has it."""
        self._writer.seal()

    def _save(self, moment: Moment) -> None:
        self._writer.save(
            moment.rounds, moment.steps, moment.state(), moment.notes, moment.shelf
        )
        if self._at_once:
            self._writer.seal()
