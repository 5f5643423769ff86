"""Fit the exits of a run exactly, and write the result as a new run."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hsee_jax.config.values import override
from hsee_jax.core.errors import UserError
from hsee_jax.core.files import replace_file, writing
from hsee_jax.core.options import Option, at_least
from hsee_jax.engine.refit import ExitFit
from hsee_jax.federation.ridge import RIDGE
from hsee_jax.runs.checkpoint import load, load_shelf
from hsee_jax.runs.checkpoint_writer import Writer
from hsee_jax.runs.data import OwnData
from hsee_jax.runs.folder import check_name, check_writable, read_config
from hsee_jax.runs.history import finished_records
from hsee_jax.runs.json_text import dumps
from hsee_jax.runs.records import RoundRecord, Scores, link_of, summarize
from hsee_jax.runs.reopen import reopen_phases
from hsee_jax.runs.same_data import check_partition
from hsee_jax.runs.start import Start, prepare_folder
from hsee_jax.systems.traffic import Bytes

_RIDGE = Option("ridge", float, RIDGE, rules=(at_least(0),))


class Refit(NamedTuple):
    """What a fit of the exits of a run gives on its test set."""

    ridge: float
    exits: tuple[ExitFit, ...]  # by ascending cut
    before: Scores
    after: Scores

    @property
    def link(self) -> Bytes:
        """Return the bytes on all links."""
        return link_of(self.exits)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as values of JSON."""
        return {
            "ridge": self.ridge,
            "link": self.link._asdict(),
            "exits": [one._asdict() for one in self.exits],
            "before": self.before.to_json(),
            "after": self.after.to_json(),
        }


def refit(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    ridge: float = RIDGE,
    which: str | int = "latest",
    data_dir: str | None = None,
    data: OwnData | None = None,
) -> Refit:
    """Fit all exits of a run in one round, and write a run with the new exits.

    The new folder holds the run as it was at the checkpoint, with the new exits and
    ``refit.json``, for every command and for further training. The run itself stays.

    Args:
      folder: of the run.
      out: the new folder; None is ``refit`` in the folder of the run.
      ridge: the penalty, see `hsee_jax.federation.solve`.
      which: the checkpoint, see `restore`.
      data_dir: see `reopen`.
      data: see `reopen`.

    Raises:
      UserError: see `reopen`; or the penalty is not allowed, the samples are not the
        run's own, an exit is one of several or does not end in a linear layer, records
        of rounds are missing, or the new folder exists or cannot be written.
    """
    folder, ridge = Path(folder), _RIDGE.checked(ridge)
    out = folder / "refit" if out is None else Path(out)
    check_name(out)
    check_writable(out)
    _check_new(out)
    phases, origin = reopen_phases(folder, which, data_dir=data_dir, data=data)
    experiment = phases.at(origin.number)
    stored = load(origin, experiment.store.checkpoint_shapes())
    shelf = load_shelf(origin, phases.shelf_shapes(origin.number))
    check_partition(folder, experiment.manifest)
    records = finished_records(folder, int(stored.round))
    state = experiment.store.from_checkpoint(stored)
    before = Scores.of(experiment.evaluate(state, experiment.test))
    state, exits = experiment.refit_exits(state, ridge)
    results = experiment.evaluate(state, experiment.test)
    found = Refit(ridge, tuple(exits), before, Scores.of(results))
    records = (*records[:-1], *(_refitted(last, found) for last in records[-1:]))
    pretrained = read_config(folder).model.pretrained  # `reopen_phases` has left it out
    config = override(experiment.config, pretrained=pretrained)
    manifest = phases.at(1).manifest  # it has the cuts of the first round
    with _whole(out) as part:
        start = Start(state, records)
        first = experiment._replace(config=config, manifest=manifest)
        prepare_folder(part, first, start)
        notes = {"score": found.after.mean_server_accuracy}
        with Writer(part / "checkpoints", keep=1, hint="nothing is kept") as writer:
            checkpoint = experiment.store.to_checkpoint(state)
            writer.save(int(state.round), 0, checkpoint, notes, shelf)
        replace_file(part / "refit.json", dumps(found.to_json()))
        if len(records) == experiment.cadence.rounds:
            summary = summarize(results, records, experiment.bytes_by_cut())
            replace_file(part / "summary.json", dumps(summary.to_json()))
    return found


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Yield a folder that gets the name ``out`` when it is whole; remove it else."""
    part = out.with_name(f"{out.name}.{os.getpid()}.tmp")  # nobody else's
    with writing(out):
        part.mkdir(parents=True)
    try:
        yield part
        _check_new(out)
        with writing(out):
            part.replace(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _check_new(out: Path) -> None:
    if os.path.exists(out):
        raise UserError(f"out: {out} exists already; allowed is a new folder")


def _refitted(record: RoundRecord, found: Refit) -> RoundRecord:
    """Return the record of a round after which the exits were fitted."""
    return record._replace(test=found.after, link=record.link.plus(found.link))
