"""A run of Weights & Biases."""

import logging
import os
from pathlib import Path
from typing import Any

from hsee_jax.core.errors import Stopped, no_package
from hsee_jax.runs.experiment import Experiment
from hsee_jax.runs.records import RoundRecord, Summary
from hsee_jax.tracking.bookmark import Bookmark
from hsee_jax.tracking.registry import register
from hsee_jax.tracking.tracker import Tracker

_log = logging.getLogger(__name__)
_KILLED = 255  # the exit code by which W&B recognises a run that was interrupted


@register(
    summary="a run of Weights & Biases, with its files in RUN/wandb; see WANDB_MODE"
)
def wandb(folder: str | os.PathLike[str]) -> Tracker:
    """Log to a run of Weights & Biases, with its files in RUN/wandb."""
    return WandbRun(folder)


class WandbRun(Tracker):
    """Logs to Weights & Biases, as the variables WANDB_... of the environment say."""

    name = "wandb"

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Choose the run's folder.

        Raises:
          UserError: W&B is not installed.
        """
        super().__init__(folder)
        try:
            import wandb as library
        except ImportError as error:
            raise no_package(self.name, self.name) from error
        self._library: Any = library
        self._run: Any = None

    def open(self, experiment: Experiment, bookmark: Bookmark, rounds: int) -> Bookmark:
        """Create a run with the options of the experiment, or continue the run."""
        environment = os.environ
        self._run = self._library.init(
            project=environment.get("WANDB_PROJECT", "hsee-jax"),
            name=environment.get("WANDB_NAME", self.folder.resolve().name),
            dir=environment.get("WANDB_DIR", self.folder),
            id=bookmark.run_id or environment.get("WANDB_RUN_ID"),
            resume="allow",
            mode="offline" if self._lacks_login() else None,
            config=experiment.options,
            # Leave the terminal and the standard streams alone.
            settings=self._library.Settings(silent=True, console="off"),
        )
        if self._run.offline:
            where = Path(self._run.dir).parent
            _log.info("wandb: offline; `wandb sync %s` uploads the run", where)
        else:
            _log.info("wandb: %s", self._run.url)
        return bookmark._replace(run_id=self._run.id)

    def log(self, record: RoundRecord) -> None:
        """Log the figures of a round."""
        self._run.log(record.scalars(), step=record.round)

    def finish(self, summary: Summary) -> None:
        """Add the summary to the summary of the run."""
        self._run.summary.update(summary.to_json())

    def close(self, error: type[BaseException] | None) -> None:
        """Finish the run."""
        if self._run is None:
            return
        status = 0 if error is None else 1
        if error is not None and issubclass(error, Stopped | KeyboardInterrupt):
            status = _KILLED
        self._run.finish(exit_code=status)

    def _lacks_login(self) -> bool:
        """Return whether W&B would ask for a login, with nobody there to answer."""
        if "WANDB_MODE" in os.environ:
            return False
        return not self._library.login(prompt=False, verify=False)
