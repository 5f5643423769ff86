"""Build the experiment of a run in a folder again, and evaluate it."""

import os
from pathlib import Path

import numpy as np

from hsee_jax.config.schema import Config
from hsee_jax.config.values import override
from hsee_jax.core.paths import expand_home, resolve
from hsee_jax.core.types import Dataset
from hsee_jax.federation.state import RunState
from hsee_jax.runs.build import build
from hsee_jax.runs.checkpoint import Checkpoint, load
from hsee_jax.runs.clock import with_clock
from hsee_jax.runs.data import DataSource, OwnData, data_source, own_field
from hsee_jax.runs.equipment import FILE, check_count, stored_equipment
from hsee_jax.runs.experiment import Experiment
from hsee_jax.runs.folder import read_config
from hsee_jax.runs.material import deal
from hsee_jax.runs.phases import Phases
from hsee_jax.runs.private import check_layers
from hsee_jax.runs.records import Scores
from hsee_jax.runs.restore import Restored, checkpoint_of
from hsee_jax.runs.same_data import check_info, check_partition


def reopen(
    folder: str | os.PathLike[str],
    which: str | int = "latest",
    *,
    data_dir: str | None = None,
    data: OwnData | None = None,
) -> tuple[Experiment, RunState]:
    """Build a run's experiment again and read its state.

    Args:
      folder: the run's folder.
      which: see `restore`.
      data_dir: the folder with the datasets; None for ``data_dir`` of the run.
      data: the arrays of a run that was trained on arrays, see `build`.

    Returns:
      The experiment, with the cuts of the checkpoint's last round, and the state as a
      checkpoint holds it.

    Raises:
      UserError: there is no such run, it has no checkpoint, its clients kept their
        layers private, or its data are missing, or differ from the data of the run.
    """
    phases, checkpoint = reopen_phases(folder, which, data_dir=data_dir, data=data)
    experiment = phases.at(checkpoint.number)
    return experiment, load(checkpoint, experiment.store.checkpoint_shapes())


def reopen_phases(
    folder: str | os.PathLike[str],
    which: str | int = "latest",
    *,
    data_dir: str | None = None,
    data: OwnData | None = None,
) -> tuple[Phases, Checkpoint]:
    """Build the phases of a run again, and find a checkpoint; see `reopen`."""
    folder = Path(folder)
    config = override(read_config(folder), pretrained=None)  # weights are stored
    check_layers(config)
    config, source = _with_data(folder, config, data_dir, data)
    checkpoint = checkpoint_of(folder, which)
    equipment = stored_equipment(folder)
    if equipment is not None:
        check_count(config, equipment, str(folder / FILE))
    whole = with_clock(build(config, source), equipment)
    return Phases(whole), checkpoint


def _with_data(
    folder: Path, config: Config, data_dir: str | None, data: OwnData | None
) -> tuple[Config, DataSource]:
    """Find the data of a run; return its configuration with their folder, too."""
    if data_dir is not None:
        place = resolve(expand_home(data_dir, "data_dir"))
        config = override(config, data_dir=str(place))
    source = data_source(config.data, data)
    check_info(folder, source.info, own_field(config.data))
    return config, source


def evaluate(
    folder: str | os.PathLike[str],
    which: str | int = "latest",
    *,
    data_dir: str | None = None,
    data: OwnData | None = None,
) -> tuple[int, Scores]:
    """Evaluate a checkpoint on the test set, see `reopen`.

    Returns:
      The number of finished rounds, and the scores.

    Raises:
      UserError: see `reopen`; or the run's test set is a part of the dataset, which is
        stored in another form now.
    """
    experiment, state = reopen(folder, which, data_dir=data_dir, data=data)
    if experiment.config.data.max_test_samples is not None:  # the first of this form
        check_partition(Path(folder), experiment.manifest, test_only=True)
    slots = experiment.store.from_checkpoint(state)
    return int(state.round), Scores.of(experiment.evaluate(slots, experiment.test))


def samples_of(
    run: Restored,
    folder: str | os.PathLike[str],
    client: int,
    *,
    data_dir: str | None = None,
    data: OwnData | None = None,
) -> Dataset:
    """Read the training samples of a client again.

    Args:
      run: the restored run.
      folder: of the run.
      client: its id.
      data_dir: see `reopen`.
      data: see `reopen`.

    Returns:
      The samples ``[M, ...]`` as they are stored, on the host, with all their labels.

    Raises:
      UserError: the data are missing, or differ from the data of the run.
    """
    folder = Path(folder)
    config, source = _with_data(folder, run.config, data_dir, data)
    train, test = source.read()
    groups, copies = run.federation.groups, run.strategy.copies
    found = deal(config, source.info, groups, train, test, copies=copies)
    check_partition(folder, found.manifest)
    part = found.parts[client]
    return Dataset(*(np.asarray(array)[part] for array in train))
