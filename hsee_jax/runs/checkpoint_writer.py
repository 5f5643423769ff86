"""Write checkpoints in the background, in the form of `hsee_jax.runs.checkpoint`."""

import json
import logging
import shutil
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any

import jax

from hsee_jax.core.errors import Stopped, UserError
from hsee_jax.core.files import sync_to_disk, sync_tree
from hsee_jax.core.types import PyTree
from hsee_jax.parallel.processes import in_any, in_first, is_first
from hsee_jax.runs.checkpoint import SHELF, Checkpoint, reason_of
from hsee_jax.runs.checkpoint_folder import (
    DIGESTS,
    NOTES,
    UNFINISHED,
    compute_digests,
    find_places,
    find_unfinished,
    read_score,
    remove,
)
from hsee_jax.runs.stored_links import without_links

_DAMAGED = ".damaged"  # suffix of the name of a damaged checkpoint


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
        # Orbax logs what this raises, and the tracebacks of its threads.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._folder, self._keep, self._after = folder, keep, after
        self._hint = hint
        self._unsealed: tuple[Path, Mapping[str, Any], Any] | None = None
        self._written = Event()  # whether the arrays of the unsealed are on the disk

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
                ocp.save((folder / SHELF).absolute(), shelf)
            response = ocp.save_async((folder / "state").absolute(), copy)
        except Exception as error:
            raise self._unwritten(folder, error) from error
        written = Event()
        response.on_complete(lambda _: written.set())
        self._unsealed, self._written = (folder, notes, response), written

    def seal(self) -> None:
        """Wait for the checkpoint that is being written, and give it its name."""
        self._seal(together=True)

    def seal_written(self) -> None:
        """Give the last checkpoint its name if all processes have written it."""
        if self._unsealed is not None and not in_any(not self._written.is_set()):
            self.seal()

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
        if together and in_any(failure is not None) and failure is None:
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
        for path in find_unfinished(self._folder):
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
        for thread in threading.enumerate():  # of Orbax, which still write
            if type(thread).__name__ == "_SignalingThread":
                thread.join(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)  # make room on a full disk
        reason = f"{reason_of(error)}; {self._hint}"
        return UserError(
            f"out: a checkpoint cannot be written to {self._folder}: {reason}"
        )


def _copied(leaf: Any) -> Any:
    """Copy an array on its device; ``jax.Array.copy`` compiles for every shape."""
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf, leaf.sharding, may_alias=False)
    return leaf.copy()
