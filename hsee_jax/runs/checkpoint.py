"""Checkpoints with Orbax; only this file uses Orbax, and only where it needs it.

A checkpoint is a folder with the ``state`` as Orbax writes it, ``notes.json`` and
``digests.json``, the sha256 of every other file: Orbax itself reads changed bytes as if
they were weights. The folder is written under another name and renamed when it is
complete, so wherever a run is killed, every checkpoint has its digests. Its name is the
number of finished rounds; ``7-40`` is 40 steps into the round after the 7th.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax

from hsee_jax.core.errors import Stopped, UserError
from hsee_jax.core.files import sync_to_disk, sync_tree
from hsee_jax.core.types import PyTree
from hsee_jax.parallel.processes import in_first, is_first, largest
from hsee_jax.runs.checkpoint_folder import (
    DIGESTS,
    NOTES,
    UNFINISHED,
    compute_digests,
    find_places,
    read_score,
    remove,
    verify,
)
from hsee_jax.runs.stored_links import with_links, without_links
from hsee_jax.runs.stored_shapes import check_shapes

_SHELF = "shelf"
_DAMAGED = ".damaged"  # suffix of the name of a damaged checkpoint
_log = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A checkpoint with intact files."""

    folder: Path
    rounds: int  # finished rounds
    steps: int  # finished steps of the next round
    notes: Mapping[str, Any]  # the notes of `Writer.save`

    @property
    def number(self) -> int:
        """Return the last round that it has trained, whole or in part; at least 1."""
        return max(self.rounds + (self.steps > 0), 1)


def find(
    folder: Path, which: str = "latest", *, midway: bool = False
) -> Checkpoint | None:
    """Choose a checkpoint, and compare its files with their digests.

    If a checkpoint is damaged, log a warning and try the next best.

    Args:
      folder: the folder of the checkpoints.
      which: ``"latest"``, or ``"best"`` for the checkpoint with the highest score.
      midway: whether a checkpoint in the middle of a round may be chosen.

    Returns:
      The checkpoint, or None if the folder holds none.

    Raises:
      UserError: all checkpoints are damaged.
    """
    places = {
        place: path
        for place, path in find_places(folder).items()
        if place[1] == 0 or midway
    }
    damage: UserError | None = None
    for place in sorted(
        places,
        key=lambda p: (read_score(places[p]) if which == "best" else 0, p),
        reverse=True,
    ):
        try:
            verify(places[place])
        except UserError as error:
            damage = damage or error
            _log.warning("%s; an earlier one is looked for", error)
            continue
        notes = json.loads((places[place] / NOTES).read_text(encoding="utf-8"))
        return Checkpoint(places[place], *place, notes)
    if damage is not None:
        raise damage
    return None


def load(checkpoint: Checkpoint, like: PyTree) -> PyTree:
    """Read a checkpoint, whatever devices wrote it.

    Args:
      checkpoint: see `find`.
      like: a `jax.ShapeDtypeStruct` for every leaf, with its new sharding, or without a
        sharding for the first device; ``...`` for a leaf that is not read. A stack may
        have more or fewer empty slots at its end than the stored stack.

    Raises:
      UserError: the checkpoint cannot be read, or holds other leaves or shapes.
    """
    return with_links(_load(checkpoint, "state", without_links(like)), like)


def load_shelf(checkpoint: Checkpoint, like: PyTree) -> PyTree:
    """Read what waits on the shelf of a checkpoint, see `hsee_jax.federation.recut`.

    Args:
      checkpoint: see `find`.
      like: see `load`; a shelf without leaves was not stored.

    Returns:
      The shelf, in numpy arrays.

    Raises:
      UserError: the shelf cannot be read, or holds other leaves.
    """
    if not jax.tree.leaves(like):
        return like
    return jax.device_get(_load(checkpoint, _SHELF, like))


def _load(checkpoint: Checkpoint, name: str, like: PyTree) -> PyTree:
    from orbax.checkpoint import v1 as ocp

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def placed(leaf: Any) -> Any:
        if leaf is ...:
            return leaf
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding or here
        )

    any_slots = ocp.Context()
    any_slots.array.loading.enable_padding_and_truncation = True
    try:
        with any_slots:
            shapes = jax.tree.map(placed, like)
            path = (checkpoint.folder / name).absolute()
            check_shapes(ocp.metadata(path).metadata, shapes)
            return ocp.load(path, shapes)
    except Exception as error:
        raise UserError(
            f"run: {checkpoint.folder} cannot be read: {_reason(error)}"
        ) from error


class Writer:
    """Writes checkpoints into a folder, in the background of a ``with`` statement.

    Raises:
      UserError: a checkpoint cannot be written; any method may raise it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        after: Checkpoint | None = None,
        hint: str = "--resume continues from the last one",
    ) -> None:
        """Choose a folder.

        Args:
          folder: the folder of the checkpoints; unfinished checkpoints are removed.
          keep: the number of latest checkpoints to keep, in addition to the best.
          after: the latest checkpoint that `find` found; later checkpoints are damaged,
            and are renamed.
          hint: what the error says of a checkpoint that cannot be written.
        """
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._folder, self._keep, self._after = folder, keep, after
        self._hint = hint
        self._unsealed: tuple[Path, Mapping[str, Any], Any] | None = None

    def __enter__(self) -> "Writer":
        """Remove unfinished checkpoints."""
        in_first(self._clean)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for the last checkpoint."""
        # After an error the other processes may be elsewhere; a stop they share.
        self._seal(together=kind is None or issubclass(kind, Stopped))

    def save(
        self,
        rounds: int,
        steps: int,
        state: PyTree,
        notes: Mapping[str, Any],
        shelf: PyTree = None,
    ) -> None:
        """Start to write a checkpoint; training may continue, and donate ``state``.

        Args:
          rounds: finished rounds.
          steps: finished steps of the next round; a checkpoint with steps is kept until
            the next checkpoint.
          state: arrays, copied before this returns.
          notes: values of JSON; the best checkpoint has the highest ``score``.
          shelf: arrays on the host, see `load_shelf`; empty or None for none.
        """
        from orbax.checkpoint import v1 as ocp

        copy = jax.tree.map(_copied, without_links(state))
        self.seal()
        name = f"{rounds}-{steps}" if steps else str(rounds)
        folder = self._folder / f"{name}{UNFINISHED}"
        in_first(partial(self._make, folder))
        try:
            if shelf:
                ocp.save((folder / _SHELF).absolute(), shelf)
            response = ocp.save_async((folder / "state").absolute(), copy)
        except Exception as error:
            raise self._unwritten(folder, error) from error
        self._unsealed = folder, notes, response

    def seal(self) -> None:
        """Wait for the checkpoint that is being written, and give it its name."""
        self._seal(together=True)

    def _seal(self, *, together: bool) -> None:
        """Finish a checkpoint, and let the other processes wait for it."""
        if self._unsealed is None:
            return
        (folder, notes, response), self._unsealed = self._unsealed, None
        failure = None
        try:
            response.result()
        except Exception as error:
            failure = error
        if together and largest(int(failure is not None)) and failure is None:
            failure = OSError("another process says why")
        if failure is not None:
            raise self._unwritten(folder, failure) from failure
        if together:
            in_first(partial(self._finish, folder, notes))
        elif is_first():
            self._finish(folder, notes)

    def _finish(self, folder: Path, notes: Mapping[str, Any]) -> None:
        """Write what belongs to a checkpoint, and give its folder its name."""
        try:
            (folder / NOTES).write_text(json.dumps(notes, indent=2), encoding="utf-8")
            digests = json.dumps(compute_digests(folder), indent=2)
            (folder / DIGESTS).write_text(digests, encoding="utf-8")
            sync_tree(folder)
            final = folder.with_name(folder.name.removesuffix(UNFINISHED))
            remove(final)
            folder.replace(final)
            sync_to_disk(final.parent)
            self._forget()
        except Exception as error:
            raise self._unwritten(folder, error) from error

    def _forget(self) -> None:
        """Remove all checkpoints except the latest and the best."""
        places = find_places(self._folder)
        whole = sorted(place for place in places if place[1] == 0)
        kept = {*whole[-self._keep :], max(places)}
        if whole:
            kept.add(max(whole, key=lambda place: (read_score(places[place]), place)))
        for place in places.keys() - kept:
            remove(places[place])

    def _clean(self) -> None:
        for path in self._folder.glob(f"*{UNFINISHED}"):
            shutil.rmtree(path)
        for place, path in find_places(self._folder).items():
            if self._after is not None and place > self._after[1:3]:
                aside = path.with_name(path.name + _DAMAGED)
                shutil.rmtree(aside, ignore_errors=True)
                path.replace(aside)

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise self._unwritten(folder, error) from error

    def _unwritten(self, folder: Path, error: Exception) -> UserError:
        shutil.rmtree(folder, ignore_errors=True)  # make room on a full disk
        return UserError(
            f"out: a checkpoint cannot be written to {self._folder}: {_reason(error)}; "
            f"{self._hint}"
        )


def _copied(leaf: Any) -> Any:
    """Copy an array on its device; ``jax.Array.copy`` compiles for every shape."""
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf, leaf.sharding, may_alias=False)
    return leaf.copy()


def _reason(error: BaseException) -> str:
    """Return the first line of the cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
