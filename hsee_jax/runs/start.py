"""Where a training begins: anew, after a round, or in the middle of one."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hsee_jax.config.schema import Config
from hsee_jax.config.values import override, to_json
from hsee_jax.core.errors import UserError
from hsee_jax.core.files import replace_file, writing
from hsee_jax.core.types import ExitMetrics, Metrics
from hsee_jax.engine.plan import EMPTY, RoundPlan
from hsee_jax.engine.round import RoundProgress
from hsee_jax.federation.recut import Shelf
from hsee_jax.runs.checkpoint import Checkpoint, find, load, load_shelf
from hsee_jax.runs.checkpoint_folder import find_places
from hsee_jax.runs.data import own_field
from hsee_jax.runs.equipment import FILE, equipment_values
from hsee_jax.runs.experiment import Experiment
from hsee_jax.runs.folder import read_config
from hsee_jax.runs.history import finished_records
from hsee_jax.runs.json_text import dumps
from hsee_jax.runs.phases import Phases
from hsee_jax.runs.records import RoundRecord
from hsee_jax.runs.same_data import check_info, check_partition

_log = logging.getLogger(__name__)

# What training, commands and trackers make of a run.
_DERIVED = (
    "checkpoints",
    "metrics.csv",
    "report",
    "gate",
    "export",
    "refit",
    "refit.json",
    "interactions",
    "tracking",
    "tensorboard",
    "wandb",
)
# What a server and its devices know of each other; a run that begins anew after a kill
# in its first round is still the run that its devices have joined.
_OF_DEVICES = ("deployment", "devices")


class Start(NamedTuple):
    """Where training begins."""

    state: Any
    records: tuple[RoundRecord, ...] = ()  # of the finished rounds
    begun: RoundProgress | None = None  # of the next round
    seconds: float = 0.0  # of training that the next round has taken
    wall_seconds: float = 0.0  # that the next round has taken in all
    checkpoint: Checkpoint | None = None
    shelf: Shelf = {}  # see `recut`
    joined: bool = False  # whether devices may have joined before


def resume_from(phases: Phases, folder: Path, journal: str | None = None) -> Start:
    """Read where a run goes on.

    Args:
      phases: of the run.
      folder: of the run.
      journal: see `hsee_jax.runs.train.train_built`.

    Raises:
      UserError: its files are damaged, its data have changed, or it has done more
        rounds than ``rounds`` allows.
    """
    checkpoint = _latest(folder, journal)
    experiment = phases.at(1)
    if checkpoint is None:
        _check_begins(folder)
        _log.warning("%s has no checkpoint; the run begins anew", folder)
        return Start(experiment.init(), joined=True)
    rounds = experiment.cadence.rounds
    if rounds < checkpoint.rounds + (checkpoint.steps > 0):
        raise UserError(
            f"rounds: {rounds} is not allowed with --resume; the run has done "
            f"{checkpoint.rounds}{' and a part' if checkpoint.steps else ''}"
        )
    if journal is not None and checkpoint.steps:
        raise UserError(
            f"run: {folder} stopped within round {checkpoint.number}, which devices "
            "cannot continue; allowed is `hsee train --resume`"
        )
    if journal is not None:
        check_devices(folder / journal, checkpoint.rounds)
    of_journal = journal is not None and (folder / journal) in checkpoint.folder.parents
    if of_journal and rounds == checkpoint.rounds:
        raise UserError(
            f"rounds: {rounds} is not allowed with --resume, as devices did not send "
            f"all layers after round {rounds}; allowed is {rounds + 1} or more"
        )
    check_info(folder, experiment.info, own_field(experiment.config.data))
    check_partition(folder, experiment.manifest)
    experiment = phases.at(checkpoint.number)
    state = load(checkpoint, experiment.store.checkpoint_shapes())
    midway = "ids" in checkpoint.notes
    if int(state.round) != checkpoint.rounds or midway != (checkpoint.steps > 0):
        raise UserError(
            f"run: {checkpoint.folder} is not the checkpoint that its name says; it "
            f"is of {int(state.round)} rounds{' and a part' if midway else ''}"
        )
    shelf = load_shelf(checkpoint, phases.shelf_shapes(checkpoint.number))
    records = finished_records(folder, checkpoint.rounds)
    state = experiment.store.from_checkpoint(state)
    start = Start(state, records, checkpoint=checkpoint, shelf=shelf)
    if checkpoint.steps == 0:
        return start
    seconds, wall_seconds = (checkpoint.notes[n] for n in ("seconds", "wall_seconds"))
    begun = _progress_from(experiment.plan(checkpoint.rounds), checkpoint)
    return start._replace(begun=begun, seconds=seconds, wall_seconds=wall_seconds)


def devices_after(journal: Path, rounds: int) -> Path:
    """Return the file of what a server knows of its devices after a round."""
    return journal.with_name(f"devices-{rounds}")


def check_devices(journal: Path, rounds: int) -> None:
    """Refuse a journal without the devices after a round: no server trained it."""
    if not devices_after(journal, rounds).exists():
        raise UserError(
            f"run: {journal.parents[1]} holds no devices after round {rounds}; "
            "allowed is a run that `hsee serve` trained"
        )


def config_to_build(config: Config, folder: Path) -> Config:
    """Return a run's configuration without ``pretrained`` if it has a checkpoint.

    A checkpoint holds all weights, and the file with the first may be gone by now.
    """
    begun = find_places(folder / "checkpoints")
    return override(config, pretrained=None) if begun else config


def _check_begins(folder: Path) -> None:
    """Refuse to begin anew where a checkpoint has been, as it would remove the rest.

    Raises:
      UserError: the folder holds what only a finished checkpoint can be made into, or
        more rounds than a run can train without one.
    """
    made = ("summary.json", "refit", "gate", "export", "interactions")
    found = [name for name in made if (folder / name).exists()]
    rounds, every = _count_lines(folder), read_config(folder).run.checkpoint_every
    # A kill or a full disk leaves the folder; each checkpoint waits for the one before.
    if rounds > (2 * every if (folder / "checkpoints").is_dir() else every):
        found.append(f"metrics.jsonl of {rounds} rounds")
    if found:
        raise UserError(
            f"run: {folder} has no checkpoint any more, but {found[0]}; allowed is "
            "--overwrite, which removes it and begins anew"
        )


def _count_lines(folder: Path) -> int:
    """Count the rounds in ``metrics.jsonl``, whose last line a kill may cut off."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _latest(folder: Path, journal: str | None) -> Checkpoint | None:
    """Find the latest intact checkpoint of a run, also in its journal.

    Raises:
      UserError: there are checkpoints, and all are damaged.
    """
    found: list[Checkpoint] = []
    damage: UserError | None = None
    for name in ("checkpoints",) if journal is None else ("checkpoints", journal):
        try:
            checkpoint = find(folder / name, midway=name != journal)
        except UserError as error:
            damage = damage or error
            continue
        found += [] if checkpoint is None else [checkpoint]
    if damage is not None and not found:
        raise damage
    return max(found, key=lambda one: (one.rounds, one.steps), default=None)


def midway_notes(
    plan: RoundPlan, progress: RoundProgress, seconds: float, wall_seconds: float
) -> dict[str, Any]:
    """Return what a checkpoint in the middle of a round notes."""
    exit_sums, server_sums, link = progress.metrics
    return {
        "seconds": seconds,
        "wall_seconds": wall_seconds,
        "ids": plan.ids.tolist(),
        "metrics": [[s.tolist() for s in sums] for sums in (exit_sums, server_sums)],
        "link": np.asarray(link).tolist(),
    }


def _progress_from(plan: RoundPlan, checkpoint: Checkpoint) -> RoundProgress:
    """Read the progress of a round, with each client's sums in its present slot."""
    notes: Any = checkpoint.notes
    seats = {i: n for n, i in enumerate(notes["ids"]) if i != EMPTY}
    nothing = [[0, 0], [0, 0]]

    def moved(sums: list[Any], empty: Any = 0.0) -> npt.NDArray[Any]:
        ids = plan.ids.tolist()
        return np.array([sums[seats[i]] if i in seats else empty for i in ids])

    # Version 0.1 did not count the bytes of each message.
    link = notes.get("link", [nothing] * len(notes["ids"]))
    sums: Any = [tuple(map(moved, sums)) for sums in notes["metrics"]]
    exit_sums, server_sums = (Metrics(*branch) for branch in sums)
    moved_link: Any = moved(link, nothing)
    metrics = ExitMetrics(exit_sums, server_sums, moved_link)
    return RoundProgress(checkpoint.steps, False, metrics)


def warn_of_period(experiment: Experiment) -> None:
    """Warn if the run ends before its first average."""
    rounds, steps = experiment.learning_rates.shape  # of the run, and of a round
    period, unit = experiment.strategy.period, experiment.strategy.period_unit
    length = rounds * steps if unit == "steps" else rounds
    if period > length:
        _log.warning(
            "period: %d %s are more than the run has (%d), so nothing is averaged",
            period,
            unit,
            length,
        )


def prepare_folder(folder: Path, experiment: Experiment, start: Start) -> None:
    """Write the files that a run has at its start, and remove what is out of date.

    The devices and then the configuration are written first, and are on the disk at
    once: with them alone a new run can be resumed.
    """
    if start.checkpoint is None:
        for derived in _DERIVED if start.joined else (*_DERIVED, *_OF_DEVICES):
            _remove(folder / derived)
    _remove(folder / "summary.json")
    if experiment.equipment is None:
        _remove(folder / FILE)
    else:
        devices = equipment_values(experiment.equipment)
        replace_file(folder / FILE, dumps(devices), sync=True)
    config = to_json(experiment.config) + "\n"
    replace_file(folder / "config.json", config, sync=True)
    replace_file(folder / "data.json", dumps(experiment.info._asdict()))
    lines = [dumps(record.to_json(), lines=True) for record in start.records]
    replace_file(folder / "metrics.jsonl", "".join(lines))
    shares = [share._asdict() for share in experiment.manifest]
    text = json.dumps(shares, separators=(",", ":"))
    replace_file(folder / "partition.json", text + "\n")


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder with all it holds, if it is there."""
    with writing(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
