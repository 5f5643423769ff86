"""The rules that all trackers share; a subclass says where the figures go."""

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from hsee_jax.core.errors import one_line
from hsee_jax.parallel.processes import is_first
from hsee_jax.runs.callbacks import Callback, Moment
from hsee_jax.runs.experiment import Experiment
from hsee_jax.runs.history import read_records
from hsee_jax.runs.records import RoundRecord, Summary
from hsee_jax.tracking.bookmark import Bookmark, read_bookmark, write_bookmark

_log = logging.getLogger(__name__)


class Tracker(Callback):
    """Hands the rounds of a run to another program.

    A subclass sets `name` and defines `open` and `log`; it may define `finish` and
    `close`. This class calls them in the first process only. If one of them fails, the
    class warns once, and training goes on without the tracker.

    A resumed run first hands over the rounds that the tracker lacks, and does not
    repeat the rounds that it holds. The figures are `RoundRecord.scalars`.
    """

    name: ClassVar[str]

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Choose the folder of the run, the same as for `train`."""
        self.folder = Path(folder)
        self._bookmark = Bookmark()
        self._active = False

    def open(self, experiment: Experiment, bookmark: Bookmark, rounds: int) -> Bookmark:
        """Start to track a run, or continue.

        Args:
          experiment: the run.
          bookmark: the place reached before; empty for a new run.
          rounds: number of finished rounds. A tracker may hold more: a run that was
            killed continues from its last checkpoint.

        Returns:
          The place where the tracker continues.
        """
        raise NotImplementedError

    def log(self, record: RoundRecord) -> None:
        """Hand over a round."""
        raise NotImplementedError

    def finish(self, summary: Summary) -> None:
        """Hand over the summary, after the last round."""

    def close(self, error: type[BaseException] | None) -> None:
        """Release what `open` has opened; it may have failed halfway.

        Args:
          error: the kind of error that ended the training, `Stopped` for a stop; None
            if it came to its end.
        """

    def on_start(self, experiment: Experiment) -> None:
        """Open the tracker, and hand over the rounds that it lacks."""
        self._active = is_first()
        self._attempt(self._begin, experiment)

    def on_round(self, record: RoundRecord, moment: Moment) -> None:
        """Hand over a round."""
        self._attempt(self._hand_over, record)

    def on_end(self, summary: Summary) -> None:
        """Hand over the summary."""
        self._attempt(self.finish, summary)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the tracker."""
        self._attempt(self.close, kind)
        self._active = False

    def _begin(self, experiment: Experiment) -> None:
        records = read_records(self.folder)
        known = read_bookmark(self._path)
        place, planned = self.open(experiment, known, len(records)), known.planned
        self._keep(place._replace(planned=experiment.cadence.rounds))
        if place.rounds > len(records) and planned not in (0, self._bookmark.planned):
            _log.warning(
                "track: %s keeps its figures of rounds %d to %d, which are trained "
                "again with other learning rates; metrics.jsonl holds the new ones",
                self.name,
                len(records) + 1,
                place.rounds,
            )
        for record in records:
            self._hand_over(record)

    def _hand_over(self, record: RoundRecord) -> None:
        if record.round > self._bookmark.rounds:
            self.log(record)
            self._keep(self._bookmark._replace(rounds=record.round))

    def _keep(self, bookmark: Bookmark) -> None:
        self._bookmark = bookmark
        write_bookmark(self._path, bookmark)

    @property
    def _path(self) -> Path:
        return self.folder / "tracking" / f"{self.name}.json"

    def _attempt(self, act: Callable[..., None], *arguments: Any) -> None:
        """Call a function of an active tracker; if it fails, warn and close."""
        if not self._active:
            return
        try:
            act(*arguments)
        except Exception as error:
            self._active = False
            _log.warning(
                "track: %s failed (%s: %s); training goes on without it, and --resume "
                "hands over the rounds that it lacks",
                self.name,
                type(error).__name__,
                one_line(error)[:200],
            )
            with contextlib.suppress(Exception):
                self.close(type(error))
