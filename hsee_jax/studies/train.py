"""Train one run of a study in its folder."""

import os
from collections.abc import Callable
from pathlib import Path

from hsee_jax.config.values import settings
from hsee_jax.core.errors import DivergenceError, UserError
from hsee_jax.parallel.cores import cores
from hsee_jax.runs.checkpoint_folder import find_places
from hsee_jax.runs.data import data_source
from hsee_jax.runs.folder import read_config
from hsee_jax.runs.history import read_digest
from hsee_jax.runs.train import train
from hsee_jax.studies.results import Result
from hsee_jax.studies.study import Run


def train_run(
    run: Run,
    folder: Path,
    *,
    overwrite: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Train a run from its start, or from its last checkpoint.

    A divergence is a result.

    Args:
      run: the run.
      folder: the folder of the run.
      overwrite: replace a run with other settings, on other data, or without a
        checkpoint.
      stop: see `hsee_jax.train`.

    Raises:
      UserError: the run is not allowed; or the folder holds a run with other settings
        or on other data, and ``overwrite`` is not set.
      Stopped: ``stop`` returned true.
    """
    changed, source = changes(run, folder), None
    if changed == ():
        source = data_source(run.config.data)
        changed = changes(run, folder, source.info.digest)
    if changed and not overwrite:
        raise refusal(run, folder, changed)
    anew = bool(changed)
    if changed == () and overwrite:  # nothing to go on from, but perhaps a summary
        anew = not find_places(folder / "checkpoints")
    summary, diverged = None, ""
    try:
        summary = train(
            run.config,
            folder,
            resume=changed == () and not anew,
            overwrite=anew,
            data=source,
            stop=stop,
        )
    except DivergenceError as error:
        diverged = str(error)
    return Result(
        run.row,
        run.seed,
        settings(run.config),
        len(cores()),
        summary,
        diverged,
        read_digest(folder),
    )


def changes(
    run: Run, folder: Path, digest: str | None = None
) -> tuple[str, ...] | None:
    """Return the options in which the run in a folder differs; None without a run.

    Args:
      run: the run.
      folder: of the run.
      digest: of its data now, see `Digests`; None if not known.
    """
    if not os.path.isfile(folder / "config.json"):
        return None
    ours, theirs = settings(run.config), settings(read_config(folder))
    changed = [
        name
        for name in dict.fromkeys((*ours, *theirs))
        if ours.get(name) != theirs.get(name)
    ]
    other_data = digest is not None and read_digest(folder) not in (None, digest)
    return (*changed, "digest of the data") if other_data else tuple(changed)


def refusal(run: Run, folder: Path, changed: tuple[str, ...]) -> UserError:
    """Return the error for a folder with a run of other settings, or on other data."""
    return UserError(
        f"out: {folder} holds a run of {run.row} with another {', '.join(changed)}; "
        "allowed is another folder, or --overwrite to replace the run"
    )
