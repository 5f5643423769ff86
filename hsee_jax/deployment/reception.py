"""Serve a run: train it in its folder, with clients that are devices."""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from hsee_jax.core.errors import DivergenceError
from hsee_jax.deployment.journal import CHECKPOINTS, Journal
from hsee_jax.deployment.mailbox import Mailbox
from hsee_jax.deployment.server import over_network
from hsee_jax.deployment.service import Service
from hsee_jax.deployment.types import FEATURE_BOUND, PATIENT, Patience
from hsee_jax.federation.state import Means
from hsee_jax.runs.callbacks import Callback
from hsee_jax.runs.experiment import Experiment
from hsee_jax.runs.records import Summary
from hsee_jax.runs.served import build_served
from hsee_jax.runs.train import train_built

_FAREWELL_S = 60.0  # for devices to learn of the end, and to receive the last means

# Answers the calls of devices in its ``with`` statement.
Doors = Callable[[Service], AbstractContextManager[object]]


def serve(
    config: Any,
    folder: str | os.PathLike[str],
    doors: Doors,
    *,
    patience: Patience = PATIENT,
    bound: float = FEATURE_BOUND,
    samples: Sequence[int] = (),
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Callback] = (),
    stop: Callable[[], bool] = lambda: False,
    check: Callable[[Experiment], None] = lambda _: None,
) -> Summary:
    """Train a run to its end with clients that are devices, and write its folder.

    Args:
      config: the run, an `hsee_jax.Config`.
      folder: see `hsee_jax.train`, like `resume`, `overwrite` and `callbacks`.
      doors: lets in the calls of devices.
      patience: how long to wait for devices; a deadline of the run replaces its own.
      bound: the largest absolute value of a feature, after decoding.
      samples: see `build_served`.
      resume: go on after the last round that ended.
      overwrite: replace the run in the folder.
      callbacks: called after every round.
      stop: true ends the run; the round that is open is lost, and devices take part in
        it again.
      check: raises an error if the doors cannot serve the run.

    Returns:
      The content of ``summary.json``.

    Raises:
      UserError, DivergenceError, Stopped: see `hsee_jax.train`.
    """
    if config.clients.deadline is not None:
        patience = patience._replace(deadline_s=config.clients.deadline)
    mailbox, journal = Mailbox(patience, stop), Journal(Path(folder))

    def build_run() -> Experiment:
        experiment = build_served(config, samples)
        patience.check(config.clients.num_clients)
        check(experiment)
        seldom = patience.deadline_s is not None
        return over_network(experiment, mailbox, journal, seldom=seldom)

    reception = Reception(mailbox, journal, doors, bound)
    return train_built(
        build_run,
        config,
        folder,
        resume=resume,
        overwrite=overwrite,
        callbacks=(*callbacks, journal, reception),
        stop=lambda: False,  # the mailbox stops it, in a round that is lost
        journal=CHECKPOINTS,
    )


class Reception(Callback):
    """Lets devices in from the first round to the last, and tells them of the end."""

    def __init__(
        self, mailbox: Mailbox, journal: Journal, doors: Doors, bound: float
    ) -> None:
        """Keep the doors closed."""
        self._mailbox, self._journal = mailbox, journal
        self._doors, self._bound = doors, bound
        self._stack, self._ended = ExitStack(), False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait until the devices know of the end, if there is one; close the doors."""
        try:
            if isinstance(error, DivergenceError):
                self._end(means={})  # a resumed run trains this round again
            if self._ended:
                took_part = [i for i, last in self._journal.last.items() if last]
                self._mailbox.wait_told(took_part, _FAREWELL_S)
        finally:
            self._stack.__exit__(kind, error, traceback)

    def on_start(self, experiment: Experiment) -> None:
        """Open the doors."""
        service = Service(
            experiment, self._mailbox, self._journal.run, bound=self._bound
        )
        self._stack.enter_context(self._doors(service))

    def on_end(self, summary: Summary) -> None:
        """Tell devices that the run has ended."""
        self._journal.recall(summary.rounds)
        self._end(means=self._journal.means)

    def _end(self, *, means: Means) -> None:
        self._ended = True
        self._mailbox.end(last=self._journal.last, means=means)
