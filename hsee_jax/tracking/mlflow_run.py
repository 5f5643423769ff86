"""A run of MLflow.

This uses only MLflow's client, which sets no active run of the process and no hooks.
"""

import logging
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hsee_jax.core.errors import Stopped, no_package
from hsee_jax.core.options import text_of
from hsee_jax.runs.experiment import Experiment
from hsee_jax.runs.records import RoundRecord, Summary
from hsee_jax.tracking.bookmark import Bookmark
from hsee_jax.tracking.registry import register
from hsee_jax.tracking.tracker import Tracker

_log = logging.getLogger(__name__)
_EXPERIMENT = "hsee-jax"


@register(
    summary="a run in MLFLOW_TRACKING_URI; without it in MLflow's database, or ./mlruns"
)
def mlflow(folder: str | os.PathLike[str]) -> Tracker:
    """Log to MLFLOW_TRACKING_URI; without it to MLflow's database, or ./mlruns."""
    return MlflowRun(folder)


class MlflowRun(Tracker):
    """Logs to MLflow, in the experiment MLFLOW_EXPERIMENT_NAME or ``hsee-jax``."""

    name = "mlflow"

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Choose the run's folder.

        Raises:
          UserError: MLflow is not installed.
        """
        super().__init__(folder)
        try:
            import mlflow as library
        except ImportError as error:
            raise no_package(self.name, self.name) from error
        self._library: Any = library
        self._client: Any = None
        self._run_id = ""

    def open(self, experiment: Experiment, bookmark: Bookmark, rounds: int) -> Bookmark:
        """Create a run with the options of the experiment, or continue the run."""
        self._client = self._library.MlflowClient(self._store())
        if bookmark.run_id:
            self._client.update_run(bookmark.run_id, status="RUNNING")
        else:
            bookmark = Bookmark(self._create(experiment))
        self._run_id = bookmark.run_id
        _log.info("mlflow: run %s in %s", self._run_id, self._client.tracking_uri)
        return bookmark

    def log(self, record: RoundRecord) -> None:
        """Log the figures of a round."""
        now = int(time.time() * 1000)
        entity, figures = self._library.entities, record.scalars()
        metrics = [entity.Metric(k, v, now, record.round) for k, v in figures.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def finish(self, summary: Summary) -> None:
        """Store the summary as an artifact."""
        self._client.log_dict(self._run_id, summary.to_json(), "summary.json")

    def close(self, error: type[BaseException] | None) -> None:
        """Mark the run as finished, killed or failed."""
        status = "FINISHED" if error is None else "FAILED"
        if error is not None and issubclass(error, Stopped | KeyboardInterrupt):
            status = "KILLED"
        if self._run_id:
            self._client.set_terminated(self._run_id, status)

    def _store(self) -> str | None:
        """Return the folder to write to; None leaves the choice to MLflow."""
        # Since version 3.13 MLflow writes to a folder only where this is set.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        if self._library.is_tracking_uri_set() or find_spec("sqlalchemy"):
            return None
        return Path("mlruns").absolute().as_uri()

    def _create(self, experiment: Experiment) -> str:
        """Create a run in MLflow, and return its id."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _EXPERIMENT)
        known = self._client.get_experiment_by_name(name)
        place = known.experiment_id if known else self._client.create_experiment(name)
        run_name = self.folder.resolve().name
        run_id = self._client.create_run(place, run_name=run_name).info.run_id
        entity, options = self._library.entities, experiment.options
        params = [entity.Param(name, text_of(value)) for name, value in options.items()]
        self._client.log_batch(run_id, params=params)
        return run_id
